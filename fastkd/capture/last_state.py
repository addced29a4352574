"""The states after a model's final norm, from whichever of its modules hands them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.errors import UserError

Note = Callable[[Tensor, bool], None]
"""Takes a state [batch, tokens, width], and whether it is the first that a pass gives."""


@contextmanager
def hearing_last_state(model: PreTrainedModel, note: Note) -> Iterator[None]:
    """Let `note` hear the last hidden state of every pass that is made while the context is open.

    In one pass it may hear several, of which the last counts: what a module gives that another one
    wraps, then that one's, and in the end the model's, where that hands on states and no logits.

    Raises:
        UserError: in a pass, that the model gives a tuple, of which no one knows what it holds.
    """
    givers = _givers(model)
    with ExitStack() as stack:
        for number, module in enumerate(givers):
            named = module is model and module is not model.base_model
            hook = _hook(note, first=number == 0, named=named)
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _givers(model: PreTrainedModel) -> list[nn.Module]:
    """Modules of a model that may hand its last hidden state on, the innermost first."""
    base = model.base_model
    found: list[nn.Module] = [base]
    # a head may call what its base model wraps, and never the base model (BartForCausalLM)
    while len(inner := list(found[0].children())) == 1 and isinstance(inner[0], PreTrainedModel):
        found.insert(0, inner[0])
    # of some families the model without a head wraps its base model too, and ends in a norm
    return found if base is model else [*found, model]


def _hook(note: Note, *, first: bool, named: bool) -> Callable[..., None]:
    """Notes a module's last hidden state, which is the first element of a tuple unless it is only
    known by its name: a head's output begins with logits."""

    def hook(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, tuple):
            state = getattr(output, "last_hidden_state", None)
        elif named:
            raise UserError(
                f"{type(module).__name__} gives a tuple, of which no one knows whether states come "
                "first; call it with return_dict=True"
            )
        else:
            state = output[0]
        if isinstance(state, Tensor):
            note(state, first)

    return hook
