"""Queries, keys and values of a model's blocks, made again from the hidden states below them.

In a pass of the model every block is left out, but for what those that are asked for do before they
attend: norms, projections, rotary embeddings, by the blocks' own code. Such a block reads a hidden
state that is given; masks, positions and whatever else blocks are handed, the model makes as ever.
The road not taken: finding the projections of each architecture by name and multiplying by them,
which has to know where norms, biases and fused weights stand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from fastkd_kernels import AttentionState
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.blocks import find_blocks, first_tensor
from fastkd.capture.packed_pass import reading
from fastkd.capture.recording import capture
from fastkd.capture.routing import AttentionCall, listening
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.types import Inputs

_STORED = "take teacher.cache_attention=stored"
# of the norm of what is captured: the same code reads the same numbers again
_TOLERANCE = 2e-6


class _Reached(Exception):
    """A block attends now; the rest of it is not run."""

    def __init__(self, state: AttentionState) -> None:
        super().__init__()
        self.state = state


class RecomputedAttention:
    """What the attention of some blocks is given, from the hidden states below them alone."""

    def __init__(self, model: PreTrainedModel, outputs: Mapping[int, Any]) -> None:
        """Take down a model; `try_recomputing` sees first that it can be done.

        Args:
            model: routed by `route_attention`, whole on one device, in eval mode.
            outputs: what each block gives, a tensor or a tuple with one in front.
        """
        self._model = model
        # of a tuple the number of its elements: what stands behind the state, nobody reads
        self._sizes = {n: None if isinstance(o, Tensor) else len(o) for n, o in outputs.items()}

    def __call__(
        self, inputs: Inputs, hidden: Mapping[int, Tensor], layers: Collection[int]
    ) -> dict[int, AttentionState]:
        """The attention states of some layers, as `capture` gives them.

        Args:
            inputs: a micro-batch that the model reads, padded or packed.
            hidden: states [batch, tokens, width] of at least the layers below these.
            layers: block numbers from 1.
        """
        found: dict[int, AttentionState] = {}
        last = max(layers)
        with torch.no_grad(), ExitStack() as stack:
            for number, block in enumerate(find_blocks(self._model)[:last], start=1):
                if number in layers:
                    stack.enter_context(listening(block, _stop))
                    forward = self._begun(number, block.forward, hidden[number - 1], found, layers)
                else:
                    forward = self._left_out(number)
                stack.enter_context(_in_place_of_forward(block, forward))
            read = stack.enter_context(reading(self._model, inputs))
            # nothing above the last of them is run either
            stack.enter_context(suppress(_Reached))
            self._model(**read)
        return found

    def _begun(
        self,
        number: int,
        forward: Callable[..., Any],
        state: Tensor,
        found: dict[int, AttentionState],
        layers: Collection[int],
    ) -> Callable[..., Any]:
        def begun(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _reading(state, args, kwargs)
            try:
                forward(*args, **kwargs)
            except _Reached as reached:
                found[number] = reached.state
                if len(found) == len(layers):
                    raise
            return self._output(number, state)

        return begun

    def _left_out(self, number: int) -> Callable[..., Any]:
        def left_out(*args: Any, **kwargs: Any) -> Any:
            return self._output(number, first_tensor(args, kwargs))

        return left_out

    def _output(self, number: int, state: Tensor) -> Any:
        size = self._sizes[number]
        return state if size is None else (state, *[None] * (size - 1))


def try_recomputing(
    model: PreTrainedModel, inputs: Inputs, layers: Collection[int]
) -> RecomputedAttention:
    """Recompute attention states once, and see that they are those of a whole pass.

    Args:
        model: as `RecomputedAttention`.
        inputs: a micro-batch that it reads, with padding if it will ever read any.
        layers: block numbers from 1.

    Raises:
        UserError: they are not, or the model does not run with its blocks left out.
    """
    outputs: dict[int, Any] = {}
    below = {layer - 1 for layer in layers}
    with torch.no_grad(), ExitStack() as stack:
        for number, block in enumerate(find_blocks(model), start=1):
            stack.callback(block.register_forward_hook(_note(outputs, number)).remove)
        with capture(model, attention=layers, hidden=below) as states:
            model(**stack.enter_context(reading(model, inputs)))
    mask = inputs.get("attention_mask")
    # as it is stored, without padding
    hidden = {n: _valid(state, mask) for n, state in states.hidden.items()}
    recomputed = RecomputedAttention(model, outputs)
    name = type(model).__name__
    try:
        found = recomputed(inputs, hidden, layers)
    except FOREIGN_ERRORS as error:
        raise UserError(
            f"{name} does not run with its blocks left out ({type(error).__name__}: "
            f"{one_line(error)}), so its queries and keys can't be recomputed; {_STORED}"
        ) from error
    far = {n: _distance(found.get(n), states.attention[n], mask) for n in sorted(layers)}
    far = {n: distance for n, distance in far.items() if distance > 1}
    if far:
        raise UserError(
            f"{name}: the queries and keys of layers {list(far)} are not made of the hidden states "
            f"below them alone, so they can't be recomputed; {_STORED}"
        )
    return recomputed


def _stop(call: AttentionCall) -> None:
    raise _Reached(call.state)


def _note(outputs: dict[int, Any], number: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        outputs[number] = output

    return hook


@contextmanager
def _in_place_of_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a block run something else; an engine may have put a forward of its own on it."""
    held = {k: v for k, v in block.__dict__.items() if k == "forward"}
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        del block.__dict__["forward"]
        block.__dict__.update(held)


def _reading(
    state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with another input."""
    given = first_tensor(args, kwargs)
    places = [place for place, value in enumerate(args) if value is given]
    if places:
        return (*args[: places[0]], state, *args[places[0] + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if value is given)
    return args, {**kwargs, name: state}


def _valid(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """A tensor [batch, tokens, ...] that is 0 where there is padding."""
    if mask is None:
        return tensor
    return tensor.masked_fill(~mask.bool().reshape(*mask.shape, *[1] * (tensor.ndim - 2)), 0)


def _distance(found: AttentionState | None, expected: AttentionState, mask: Tensor | None) -> float:
    """Largest error of queries, keys and values, in what rounding may do; padding has to be
    finite."""
    if found is None:
        return torch.inf
    if (found.scale, found.softcap) != (expected.scale, expected.softcap):
        return torch.inf
    worst = 0.0
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert ours is not None and theirs is not None, "a model's attention has values"
        if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
            return torch.inf
        difference, size = (
            float(_valid(t.double().movedim(2, 1), mask).norm()) for t in (ours - theirs, theirs)
        )
        bound = max(_TOLERANCE, 2 * torch.finfo(theirs.dtype).eps) * size
        worst = max(worst, 0.0 if difference == 0 else difference / bound if bound else torch.inf)
    return worst
