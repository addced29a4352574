"""What stands on a model's blocks: record what its logits are made of, without making them.

The last layer of a language model multiplies every token with the whole vocabulary. While someone
listens, that layer notes its input and hands on a tensor without columns; divergence and
cross-entropy are computed from the input and the layer's weight by an op that never stores
[tokens, vocabulary]. A classification head is small and simply runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from fastkd_kernels import LogitsHead
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.alone import alone
from fastkd.capture.blocks import capture_keywords
from fastkd.capture.finish import Finish, find_finish, known_finish
from fastkd.capture.last_state import hearing_last_state
from fastkd.capture.modes import evaluating
from fastkd.capture.routing import runnable
from fastkd.capture.states import Capture, Slot
from fastkd.capture.trial_inputs import padded, trial_inputs
from fastkd.errors import UserError
from fastkd.types import Reading


def last_layer(model: PreTrainedModel) -> nn.Linear | None:
    """The layer that makes a language model's logits, `None` for other models."""
    layer: nn.Linear | None = model.get_output_embeddings()
    return layer


@contextmanager
def recorded_head(model: PreTrainedModel, slot: Slot, *, record: bool) -> Iterator[None]:
    """Skip a language model's logits while the context is open, unless it is given labels.

    Args:
        model: with a head or without.
        slot: while it has no states, the model runs as it is.
        record: whether it is given what the logits are made of, or the logits of another head.
    """
    layer = last_layer(model)
    if layer is None:
        if not record:
            yield
            return
        handle = model.register_forward_hook(_output_hook(slot))
        try:
            yield
        finally:
            handle.remove()
        return

    # runs the model where nobody has, with the layer as it is
    finish = finish_of(model) if record else None
    skip = _SKIPPED.get(layer)
    if skip is None:
        skip = _SKIPPED[layer] = _Skip(layer)
    listener = slot, finish
    handle = model.register_forward_pre_hook(skip.look, with_kwargs=True)
    skip.listeners.append(listener)
    try:
        yield
    finally:
        handle.remove()
        # slots of equal states are equal
        skip.listeners[:] = [other for other in skip.listeners if other is not listener]
        if not skip.listeners:
            _SKIPPED.pop(layer, None)
            skip.leave(layer)


class _Skip:
    """What stands in the place of a last layer's forward while anyone listens."""

    def __init__(self, layer: nn.Linear) -> None:
        self.listeners: list[tuple[Slot, Finish | None]] = []
        """Where each writes to, and what its model makes of the layer's output; `None` of one that
        is not given what the logits are made of."""
        self._labelled = False
        # an engine may have put a forward of its own on the layer
        self._held = {k: v for k, v in layer.__dict__.items() if k == "forward"}
        forward: Callable[[Tensor], Tensor] = layer.forward

        def skip(called: nn.Linear, hidden: Tensor) -> Tensor:
            if called is not layer:
                # a copy that was made meanwhile multiplies with its own weight; nobody listens
                return type(called).forward(called, hidden)
            return self._skip(called, forward, hidden)

        # a method, which copy.deepcopy binds to the copy
        layer.__dict__["forward"] = MethodType(skip, layer)

    def look(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See whether the model makes a loss of its own in a pass."""
        self._labelled = kwargs.get("labels") is not None

    def leave(self, layer: nn.Linear) -> None:
        """Let the layer run as before."""
        del layer.__dict__["forward"]
        layer.__dict__.update(self._held)

    def _skip(
        self, layer: nn.Linear, forward: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> Tensor:
        listening = False
        for slot, finish in self.listeners:
            states = slot.heard
            if states is None:
                continue
            listening = True
            if finish is not None:
                bias = None if layer.bias is None else _whole(layer.bias)
                states.logits = LogitsHead(hidden, _whole(layer.weight), bias, *finish)
        return forward(hidden) if self._labelled or not listening else hidden[..., :0]


_SKIPPED: WeakKeyDictionary[nn.Module, _Skip] = WeakKeyDictionary()
"""Last layers that someone listens to; contexts may be left in any order."""


def head_traits(model: PreTrainedModel) -> tuple[object, ...]:
    """What `check_head` has tried of a language model's last layer, to be compared later: whatever
    may make other logits of it than weight and bias do."""
    layer = last_layer(model)
    if layer is None:
        return ()
    names: tuple[object, ...] = tuple(name for name, _ in layer.named_parameters())
    # of adapters, which can be switched on and merged
    adapters: Any = layer if hasattr(layer, "merged") else None
    if adapters is not None:
        names += (adapters.merged, adapters.disable_adapters, *adapters.active_adapters)
    return type(layer), type(layer.weight), *names


def finish_of(model: PreTrainedModel) -> Finish:
    """What a language model makes of its last layer's output; it is run if nobody has yet.

    Raises:
        UserError: its logits can't be computed in parts, see `check_head`.
    """
    found = known_finish(model)
    # of a model without numbers there is nothing to ask
    if found is None and model.device.type != "meta":
        with alone(model), evaluating(model), runnable(model), padded(model):
            check_head(model, {**trial_inputs(model, 2), **capture_keywords(model)})
        found = known_finish(model)
    return found or Finish()


def check_head(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Run a language model on some inputs and see that its logits are its last layer's output, but
    for a factor or a soft cap.

    Raises:
        UserError: they are changed more afterwards, or made with more than weight and bias, so that
            they can't be computed in parts.
    """
    _check_parameters(model)
    layer = last_layer(model)
    assert layer is not None, "it is a language model"
    states = Capture()
    with torch.no_grad(), alone(model):
        given = model(**inputs).logits
        finish = find_finish(model, layer, inputs)
        with recorded_head(model, Slot(states), record=True):
            model(**inputs)
    head = states.logits
    assert isinstance(head, LogitsHead), "the model ran its last layer for `find_finish`"
    if type(head.weight) not in (Tensor, nn.Parameter):
        raise UserError(
            f"{type(model).__name__}: the weight of its last layer is a "
            f"{type(head.weight).__name__}, of which fastkd can't compute logits in parts; leave "
            "that layer as it is when quantising, or losses.logits and student.head out"
        )
    made = finish.of(nn.functional.linear(head.hidden, head.weight, head.bias))
    if made.shape != given.shape or not _same_logits(made, given):
        raise UserError(
            f"{type(model).__name__}: its logits are not its last layer's weight and bias times "
            "the state before it, so fastkd can't compute them in parts; leave losses.logits and "
            "student.head out"
        )


def _same_logits(made: Tensor, given: Tensor) -> bool:
    """Whether a model's logits are what its last layer made, also where it handed them on in
    another dtype, as Nemotron-H does, or capped them in half precision."""
    # the layer made both in one dtype: it is the model's own that may have fewer digits
    rounded = 4 * torch.finfo(given.dtype).eps if given.dtype != made.dtype else 0.0
    wide = torch.promote_types(made.dtype, given.dtype)
    return torch.allclose(made.to(wide), given.to(wide), atol=1e-3, rtol=max(1e-3, rounded))


def _check_parameters(model: PreTrainedModel) -> None:
    """See that all of the last layer that trains is its weight and its bias, or makes them; one
    that is frozen shows in its logits."""
    layer = last_layer(model)
    assert layer is not None, "it is a language model"
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    beside = {n: p for n, p in trained.items() if p is not layer.weight and p is not layer.bias}
    if not beside:
        return
    with torch.enable_grad():
        # a parametrisation makes its weight anew at each look
        read = [t.sum() for t in (layer.weight, layer.bias) if t is not None and t.requires_grad]
    reached: Sequence[Tensor | None] = [None] * len(beside)
    if read:
        reached = torch.autograd.grad(read, list(beside.values()), allow_unused=True)
    unread = [n for n, gradient in zip(beside, reached, strict=True) if gradient is None]
    if unread:
        raise UserError(
            f"{type(model).__name__}: its last layer ({type(layer).__name__}) trains {unread[0]} "
            "beside its weight and bias, of which fastkd computes logits in parts, so that would "
            "never learn; merge it into the weight first, or freeze it"
        )


def last_hidden_state(run: nn.Module, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The state that a head would read, [batch, tokens, width].

    Args:
        run: the model, or an engine around it.
        model: the model itself.
        inputs: its keyword arguments.
    """
    skipped = recorded_head(model, Slot(Capture()), record=False)
    with alone(model), overheard(model, "states") as heard, skipped:
        run(**inputs)
    return heard.output


class Overheard:
    """What a model gave in its last pass."""

    output: Tensor


@contextmanager
def overheard(model: PreTrainedModel, reading: Reading) -> Iterator[Overheard]:
    """Note what a model gives in every pass that is made while the context is open."""
    heard = Overheard()

    def note(state: Tensor, _first: bool) -> None:
        heard.output = state

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        heard.output = _given(output)

    if reading == "states":
        with hearing_last_state(model, note):
            yield heard
        return
    handle = model.register_forward_hook(hook)
    try:
        yield heard
    finally:
        handle.remove()


def _output_hook(slot: Slot) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        states = slot.heard
        if states is not None:
            states.logits = _given(output)

    return hook


def _given(output: Any) -> Tensor:
    """The logits that a head gives; of one that finds spans those of first and last tokens,
    [batch, tokens, 2]."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    if "logits" not in output:
        raise UserError(
            f"{type(output).__name__} has neither logits nor start_logits and end_logits, so what "
            "its head gives can't be compared; give a model of another family"
        )
    found: Tensor = output.logits
    return found


def _whole(parameter: Tensor) -> Tensor:
    # a sharded teacher's weight is gone once its layer has run
    if not parameter.requires_grad and hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    return parameter
