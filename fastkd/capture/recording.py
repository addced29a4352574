"""Record attention, hidden states and logits of the layers that someone asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastkd_kernels import AttentionState, LogitsHead
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.blocks import find_blocks
from fastkd.capture.lm_head import recorded_head
from fastkd.capture.modules import find_module, module_recorder
from fastkd.capture.routing import PREFIX, AttentionCall, Listener, listening
from fastkd.errors import UserError


@dataclass
class Capture:
    """What one forward pass left, by layer number (`fastkd.layer_map` has the convention).

    `attention[i]` holds query [batch, heads, tokens, head_dim], key and value
    [batch, kv_heads, tokens, head_dim], the scale of block i and, where it has them, the cap of its
    scores and its sinks, after rotary embeddings and before grouped heads are repeated; `hidden[i]`
    is [batch, tokens, width]. `logits` is what the head gave, [batch, outputs], or of a language
    model what its last layer would have multiplied.
    """

    attention: dict[int, AttentionState] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | LogitsHead | None = None
    outputs: Tensor | None = None
    modules: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def capture(
    model: PreTrainedModel,
    *,
    attention: Collection[int] = (),
    hidden: Collection[int] = (),
    logits: bool = False,
    outputs: bool = False,
    modules: Collection[str] = (),
) -> Iterator[Capture]:
    """Record attention and hidden states of the named layers while the context is open.

    Hooks are attached on entry and removed on exit: ZeRO-3 needs them younger than its own. The
    logits of a language model, [tokens, vocabulary], are not computed meanwhile, unless it is
    given `labels`, from which it makes a loss of its own.

    Args:
        model: routed by `route_attention` where attention is recorded, possibly wrapped and sharded
            since.
        attention: block numbers from 1.
        hidden: layer numbers from 0, the embeddings.
        logits: whether to record what the head gives or takes.
        outputs: whether to record the states after the final norm.
        modules: paths of submodules whose outputs are recorded.

    Raises:
        UserError: attention is wanted of a model that is not routed, or it has no such submodule.
    """
    if attention and not model.config._attn_implementation.startswith(PREFIX):
        raise UserError(
            f"{type(model).__name__} was not routed, so its attention can't be captured; call "
            "route_attention(model) first"
        )
    blocks = find_blocks(model) if attention or hidden else nn.ModuleList()
    states = Capture()
    with ExitStack() as stack:
        for layer in attention:
            stack.enter_context(listening(blocks[layer - 1], _recorder(states, layer)))
        for layer in hidden:
            if layer:
                handle = blocks[layer - 1].register_forward_hook(_output_hook(states, layer))
            else:
                handle = blocks[0].register_forward_pre_hook(_input_hook(states), with_kwargs=True)
            stack.callback(handle.remove)
        for path in modules:
            hook = module_recorder(states.modules, path)
            stack.callback(find_module(model, path).register_forward_hook(hook).remove)
        if outputs:
            handle = model.base_model.register_forward_hook(_final_hook(states))
            stack.callback(handle.remove)
        stack.enter_context(recorded_head(model, states if logits else None))
        yield states


def _recorder(states: Capture, layer: int) -> Listener:
    def record(call: AttentionCall) -> None:
        if layer in states.attention:
            raise UserError(
                f"block {layer} attends more than once in a forward pass, so its attention can't "
                "be captured; leave losses.attention and losses.relations out"
            )
        states.attention[layer] = call.state

    return record


def _output_hook(states: Capture, layer: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        states.hidden[layer] = output[0] if isinstance(output, tuple | list) else output

    return hook


def _final_hook(states: Capture) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        states.outputs = output.last_hidden_state

    return hook


def _input_hook(states: Capture) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # a block takes its input first, under whatever name
        states.hidden[0] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

    return hook
