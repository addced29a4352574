"""Poolers are set aside where nothing reads them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

POOLER_MARK = "fastkd_pooler"
"""Field of a configuration whose model was written with a pooler that nobody trained."""
_ASIDE = "_fastkd_pooler"


@dataclass(frozen=True)
class Pooler:
    """What stood on a model."""

    weights: dict[str, Tensor]
    """By its own names; one square matrix, perhaps a bias, else nothing."""
    trained: bool
    """Whether the weights were read, not drawn."""


class NoPooler(nn.Module):
    """Stand-in for a pooler, where a model calls it without asking whether it is there."""

    def forward(self, *_: Any) -> None:
        """Nothing."""


def drop_pooler(model: PreTrainedModel, *, trained: bool = False) -> None:
    """Take the pooler off, where there is one, and lay it aside.

    Args:
        model: changed in place.
        trained: whether its weights mean something.
    """
    pooler = getattr(model, "pooler", None)
    if pooler is None or isinstance(pooler, NoPooler):
        return
    weights = {name: parameter.detach() for name, parameter in pooler.named_parameters()}
    shapes = sorted(tuple(weight.shape) for weight in weights.values())
    width = getattr(model.config, "hidden_size", None)
    if shapes not in ([(width, width)], [(width,), (width, width)]):
        weights = {}
    # an unused parameter would still be decayed by the optimiser, in every ZeRO stage
    asks = "self.pooler is not None" in inspect.getsource(type(model).forward)
    model.pooler = None if asks else NoPooler()
    setattr(model, _ASIDE, Pooler(weights, trained))


def set_aside_pooler(model: PreTrainedModel) -> Pooler | None:
    """The pooler that was taken off, `None` where there was none."""
    found: Pooler | None = getattr(model, _ASIDE, None)
    return found


def lend_pooler(student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Lay the teacher's pooler aside for a student that had one of the same shape; nobody's, that
    is to say an untrained one, where no teacher is given."""
    own = set_aside_pooler(student)
    theirs = None if teacher is None else set_aside_pooler(teacher)
    if own is None:
        return
    fits = theirs is not None and _shapes(theirs) == _shapes(own)
    setattr(student, _ASIDE, theirs if fits else Pooler(own.weights, trained=False))


def _shapes(pooler: Pooler) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in pooler.weights.items()}
