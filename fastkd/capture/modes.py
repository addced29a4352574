"""Training and eval mode of a model that someone else set up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
