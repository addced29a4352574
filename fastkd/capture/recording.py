"""Record attention, hidden states and logits of the layers that someone asks for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.alone import alone
from fastkd.capture.blocks import find_blocks, first_tensor
from fastkd.capture.last_state import hearing_last_state
from fastkd.capture.lm_head import recorded_head
from fastkd.capture.modules import find_module, module_recorder
from fastkd.capture.routing import AttentionCall, Listener, is_routed, listening
from fastkd.capture.states import Capture, Slot, missing
from fastkd.errors import UserError


class CalledAgain(UserError):
    """A block is called more than once in a forward pass, so it has no one state."""


@contextmanager
def capture(
    model: PreTrainedModel,
    *,
    attention: Collection[int] = (),
    hidden: Collection[int] = (),
    logits: bool = False,
    outputs: bool = False,
    modules: Collection[str] = (),
    whole: bool = True,
) -> Iterator[Capture]:
    """Record attention and hidden states of the named layers while the context is open.

    Hooks are attached on entry and removed on exit: ZeRO-3 needs them younger than its own. The
    logits of a language model, [tokens, vocabulary], are not computed meanwhile, unless it is
    given `labels`, from which it makes a loss of its own. Passes of the thread that opened it are
    recorded; another thread's `capture` of the model waits for its end.

    Args:
        model: routed by `route_attention` where attention is recorded, possibly wrapped and sharded
            since.
        attention: block numbers from 1.
        hidden: layer numbers from 0, the embeddings.
        logits: whether to record what the head gives or takes.
        outputs: whether to record the states after the final norm.
        modules: paths of submodules whose outputs are recorded.
        whole: whether all of it must have been recorded when the context closes.

    Raises:
        UserError: attention is wanted of a model that is not routed, or it has no such submodule;
            in a pass, that a block is called more than once, or that another thread makes it; at
            the end, that something was not recorded, as of a model that `torch.compile` traced
            without the hooks.
    """
    wanted: dict[str, Any] = {
        "attention": attention,
        "hidden": hidden,
        "logits": logits,
        "outputs": outputs,
        "modules": modules,
    }
    states = Capture()
    slot = Slot(states, threading.get_ident())
    with alone(model), hooks(model, slot, **wanted):
        yield states
    gone = missing(states, wanted) if whole else []
    if gone:
        raise UserError(
            f"{type(model).__name__}: {', '.join(gone)} can't be captured, as it ran without "
            "fastkd's hooks; run it inside `capture`, and leave it to fastkd.capture."
            "CompiledCapture (or fastkd.Distiller with compile=True) to compile it"
        )


@contextmanager
def hooks(
    model: PreTrainedModel,
    slot: Slot,
    *,
    attention: Collection[int],
    hidden: Collection[int],
    logits: bool,
    outputs: bool,
    modules: Collection[str],
) -> Iterator[None]:
    """Let hooks stand in a model while the context is open, which write what `capture` records to
    a slot, whenever there is something to write to.

    Raises:
        UserError: as `capture` on entry.
    """
    if attention and not is_routed(model):
        raise UserError(
            f"{type(model).__name__} was not routed, so its attention can't be captured; call "
            "route_attention(model) first"
        )
    blocks = find_blocks(model) if attention or hidden else nn.ModuleList()
    with ExitStack() as stack:
        # first: it runs a model that was not tried, which nothing may hear
        stack.enter_context(recorded_head(model, slot, record=logits))
        for layer in attention:
            stack.enter_context(listening(blocks[layer - 1], _recorder(slot, layer)))
        for layer in hidden:
            if layer:
                handle = blocks[layer - 1].register_forward_hook(_output_hook(slot, layer))
            else:
                handle = blocks[0].register_forward_pre_hook(_input_hook(slot), with_kwargs=True)
            stack.callback(handle.remove)
        for path in modules:
            hook = module_recorder(slot, path)
            stack.callback(find_module(model, path).register_forward_hook(hook).remove)
        if outputs:
            stack.enter_context(hearing_last_state(model, _final_recorder(slot)))
        yield


def _recorder(slot: Slot, layer: int) -> Listener:
    def record(call: AttentionCall) -> None:
        states = slot.heard
        if states is None:
            return
        if layer in states.attention:
            raise UserError(
                f"block {layer} attends more than once in a forward pass, so its attention can't "
                "be captured; leave losses.attention and losses.relations out"
            )
        states.attention[layer] = call.state

    return record


def _output_hook(slot: Slot, layer: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        states = slot.heard
        if states is not None:
            given = output[0] if isinstance(output, tuple | list) else output
            _note_state(states, layer, given)

    return hook


def _note_state(states: Capture, layer: int, state: Tensor) -> None:
    if layer in states.hidden:
        raise CalledAgain(
            f"block {max(layer, 1)} is called more than once in a forward pass, so its states "
            "can't be captured; leave losses.attention, losses.relations, losses.hidden and "
            "losses.embedding out, or give a model that calls each block once"
        )
    states.hidden[layer] = state


def _final_recorder(slot: Slot) -> Callable[[Tensor, bool], None]:
    def note(state: Tensor, first: bool) -> None:
        states = slot.heard
        if states is None:
            return
        if first and states.outputs is not None:
            raise UserError(
                "the base model runs more than once in a forward pass, so its outputs can't be "
                "captured; leave losses of embeddings out, or give a model that runs it once"
            )
        states.outputs = state

    return note


def _input_hook(slot: Slot) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = slot.heard
        if states is not None:
            _note_state(states, 0, first_tensor(args, kwargs))

    return hook
