"""A forward pass without numbers: what it computes, and what it leaves in memory.

Models on torch's meta device have shapes alone, so that a pass of a model of any size takes a
moment and no memory. Matrix products are counted by torch, the tensors that a backward pass would
read by the hooks of autograd. Attention is counted as flash attention does it, which stores no map,
or as the model's own eager function does.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from fastkd.capture import (
    AttentionShape,
    AttentionTraits,
    Capture,
    at_depth,
    capture,
    capture_keywords,
)
from fastkd.capture.routing import PREFIX, eager_function, listening_function
from fastkd.types import Inputs

_NAME = "counted"


@dataclass
class DryPass:
    """What one forward pass of a micro-batch comes to."""

    captured: Capture
    products: int = 0
    """Floating-point operations of its matrix products, attention left out."""
    float8: int = 0
    """Those of them that multiply float8."""
    attention: int = 0
    """Those of its attention; of what a causal model does not see, none but of eager."""
    saved: int = 0
    """Bytes that a backward pass would read, weights left out."""
    largest: int = 0
    """Bytes of the largest tensor that a module gives."""
    traits: AttentionTraits = field(default_factory=AttentionTraits)


def dry_pass(
    model: PreTrainedModel,
    inputs: Inputs,
    layers: dict[str, Any],
    *,
    depth: int | None = None,
    train: bool = False,
    eager: bool = False,
) -> DryPass:
    """Run a model on the meta device.

    Args:
        model: there, and wherever its attention goes through transformers' interface.
        inputs: there.
        layers: what is captured, as keyword arguments of `capture`.
        depth: blocks that run; all of them where not given.
        train: whether a backward pass would follow.
        eager: whether its attention makes maps.

    Raises:
        UserError: there is no eager function of its attention.
    """
    attention = _Attention(eager)
    AttentionInterface.register(_NAME, attention)
    # without a mask function of this name transformers makes no mask
    AttentionInterface.register(PREFIX + _NAME, listening_function(_NAME))
    model.config._attn_implementation = PREFIX + _NAME
    saved = Storages({weight.untyped_storage()._cdata for weight in model.parameters()})
    largest = [0]
    hooks = [module.register_forward_hook(_noting(largest)) for module in model.modules()]
    model.train(train)
    cut = nullcontext() if depth is None else at_depth(model, max(depth, 1))
    counter = FlopCounterMode(display=False)
    kept = torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor)
    grad = torch.set_grad_enabled(train)
    with torch.device("meta"), cut, capture(model, **layers) as captured, counter, grad, kept:
        model(**inputs, **capture_keywords(model))
    for hook in hooks:
        hook.remove()
    return DryPass(
        captured,
        # what eager attention multiplies torch has counted as well
        counter.get_total_flops() - eager * attention.operations,
        counter.get_flop_counts()["Global"].get(torch.ops.aten._scaled_mm, 0),
        attention.operations,
        saved.bytes,
        largest[0],
        AttentionTraits(causal=attention.causal, shapes=tuple(attention.shapes)),
    )


def tensors_of(captured: Capture) -> list[Tensor]:
    """Every tensor of a capture that a model made, its weights left out."""
    found = [*captured.hidden.values(), *captured.modules.values()]
    for state in captured.attention.values():
        found += [t for t in (state.query, state.key, state.value) if t is not None]
    logits = captured.logits
    found += [] if logits is None else [logits if isinstance(logits, Tensor) else logits.hidden]
    whole = captured.outputs, captured.embedding
    return [*found, *(tensor for tensor in whole if tensor is not None)]


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of tensors, of which some may be views of others' memory."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Storages:
    """Counts memory once that several tensors look at, and none that is known."""

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._kept: dict[int, Any] = {}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            # kept, so that no other gets its address
            self._kept[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())


def _noting(largest: list[int]) -> Any:
    def note(module: nn.Module, given: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                largest[0] = max(largest[0], tensor.numel() * tensor.element_size())

    return note


class _Attention:
    """An attention function of transformers that counts what it would do."""

    def __init__(self, eager: bool) -> None:
        self._eager = eager
        self.operations = 0
        self.causal = False
        self.shapes: dict[AttentionShape, None] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **given: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, heads, tokens, size = query.shape
        shape = AttentionShape(heads, key.shape[1], size, value.shape[3])
        self.shapes[shape] = None
        causal = bool(getattr(module, "is_causal", True))
        self.causal |= causal
        window = given.get("sliding_window")
        # one that sees both sides gives half of its window
        width = tokens if window is None else window if causal else 2 * window - 1
        seen = min(tokens, width)
        pairs = batch * heads * tokens * seen // (2 if causal and seen == tokens else 1)
        if self._eager:
            pairs = batch * heads * tokens * tokens
        self.operations += 2 * pairs * (size + value.shape[3])
        if self._eager:
            function = eager_function(type(module))
            made: tuple[Tensor, Tensor | None] = function(
                module, query, key, value, attention_mask, **given
            )
            return made
        output: Tensor = _Flash.apply(query, key, value)  # type: ignore[no-untyped-call]
        return output, None


class _Flash(torch.autograd.Function):
    """Keeps for the backward what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[3])
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output
