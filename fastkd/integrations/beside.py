"""What stands beside a student while a `Trainer` trains it, and the forward that makes its loss.

A step's loss has to come out of the model as it is wrapped, so that DDP sees the pass: the model's
forward gives it where it is asked to. Both are found through the model that is called, never
through a closure: copies and pickles that callbacks make meanwhile are students of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

_NAME = "fastkd_losses"
"""The submodule of the student."""
_ASKED = "_fastkd_beside"
_PLAIN = "_fastkd_forward"
"""Attributes of the model: what is asked for, and its forwards without that, numbered."""
_MARK = "_fastkd_asks"


class Beside(nn.Module):
    """Projections and learned weights of the losses, a submodule of the student while it trains.

    Optimisers, DDP, the clipping of gradients and `zero_grad` find its parameters there. State
    dicts, folders, copies (`copy.deepcopy`) and pickles of the student hold nothing of it.
    """

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.asked: Callable[[], Tensor] | None = None
        """What the model's next forward gives, in place of its own."""
        self.register_load_state_dict_post_hook(_expect_nothing)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[Any, ...]:
        # a module's slot may hold None
        return type(None), ()

    def state_dict(self, *_arguments: Any, destination: Any = None, **_keywords: Any) -> Any:
        """Nothing."""
        return {} if destination is None else destination


def _expect_nothing(_beside: nn.Module, found: Any) -> None:
    found.missing_keys[:] = [key for key in found.missing_keys if f"{_NAME}." not in key]


@contextmanager
def attached(model: nn.Module, student: nn.Module, beside: Beside) -> Iterator[None]:
    """Let what trains beside a student be found, and `model(...)` give what `beside` is asked for.

    Mixed precision wraps the forward that it finds, for good; there the model keeps one that gives
    its own from then on, as it asks for nothing.

    Args:
        model: what is called: the student, or the SentenceTransformer around it.
        student: the model of transformers that trains.
        beside: what belongs to its losses.
    """
    found = model.__dict__.get("forward")
    plain = f"{_PLAIN}_{sum(name.startswith(_PLAIN) for name in model.__dict__)}"
    placed = None if _asks(model.forward) else _asking(model, plain)
    if placed is not None:
        model.__dict__.update({plain: model.forward, "forward": placed})
    model.__dict__[_ASKED] = student._modules[_NAME] = beside
    try:
        yield
    finally:
        beside.asked = None
        del model.__dict__[_ASKED], student._modules[_NAME]
        if placed is not None and model.__dict__.get("forward") is placed:
            del model.__dict__["forward"], model.__dict__[plain]
            if found is not None:
                model.__dict__["forward"] = found


def _asking(model: nn.Module, name: str) -> MethodType:
    """A forward of a model that looks for what is asked of the model that it is bound to, and else
    runs that model's attribute of a name."""

    # copies bind it anew, and pickle finds methods by their name
    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        attributes = self.__dict__
        beside, plain = attributes.get(_ASKED), attributes[name]
        if beside is None or beside.asked is None:
            return plain(*arguments, **keywords)
        asked, beside.asked = beside.asked, None
        # autocast around the forward can't be entered twice, and the student runs within it
        around, attributes["forward"] = attributes["forward"], plain
        try:
            return asked()
        finally:
            attributes["forward"] = around

    # transformers reads its keywords from it, and accelerate unwraps to it
    forward.__wrapped__ = getattr(model.forward, "__func__", model.forward)  # type: ignore[attr-defined]
    setattr(forward, _MARK, True)
    return MethodType(forward, model)


def _asks(forward: Any) -> bool:
    """Whether a forward is, or wraps, one of `_asking`."""
    while forward is not None:
        if getattr(forward, _MARK, False):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False
