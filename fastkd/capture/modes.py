"""Training and eval mode of a model that someone else set up, and who has it so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

# what is open of which object, for how many
_OPEN: dict[tuple[str, int], tuple[AbstractContextManager[None], int]] = {}
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model be in eval mode while the context is open; at its end, whatever happens, each of
    its modules is in the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # a module may do something of its own at a change of its mode; parts come after the whole
        for module, training in before.items():
            if module.training != training:
                module.train(training)


@contextmanager
def shared(
    owner: object, make: Callable[[], AbstractContextManager[None]], what: str
) -> Iterator[None]:
    """A context that several may have open, in whatever order they leave: the first enters it and
    the last leaves it.

    Args:
        owner: what it changes.
        make: gives the context.
        what: it changes of it.
    """
    key = what, id(owner)
    with _ONE_AT_A_TIME:
        context, users = _OPEN.get(key) or (make(), 0)
        if not users:
            context.__enter__()
        _OPEN[key] = context, users + 1
    try:
        yield
    finally:
        with _ONE_AT_A_TIME:
            context, users = _OPEN.pop(key)
            if users > 1:
                _OPEN[key] = context, users - 1
            else:
                context.__exit__(None, None, None)
