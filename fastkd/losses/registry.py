"""Losses by name: those of fastkd, and those that others register."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastkd.errors import UserError
from fastkd.plugins import note_source, place_of
from fastkd.section import check_annotations, did_you_mean

if TYPE_CHECKING:
    from fastkd.losses.base import Loss

BUILT_IN = (
    "attention",
    "relations",
    "hidden",
    "embedding",
    "logits",
    "labels",
    "mlm",
    "rkd",
    "fsp",
    "embedding_output",
    "similarity",
    "contrastive",
    "score",
)
"""Losses of fastkd, each a module of this folder; their order is that of terms and metrics."""

OTHER_KEYS = (
    "terms",
    "balance",
    "reduction",
    "projection",
    "projection_bias",
    "projection_learning_rate",
)
"""What else stands beside losses in their section of a recipe."""

_LOSSES: dict[str, type[Loss]] = {}

L = TypeVar("L", bound="type[Loss]")


def register_loss(name: str) -> Callable[[L], L]:
    """Make a subclass of `Loss` known as `losses.NAME` of a recipe; a decorator.

    Raises:
        UserError: another loss has that name, it can be no key of a recipe, or what is decorated
            is no whole loss.
    """
    if not is_loss_name(name):
        raise UserError(
            f"a loss can't be called {name!r}; give a name of letters, digits, - and _ that "
            "begins with a letter"
        )

    def register(loss: L) -> L:
        _check_loss(name, loss)
        known = _LOSSES.get(name)
        if known is not None and place_of(known) != place_of(loss):
            raise UserError(
                f"a loss {name} is registered already ({place_of(known)}); give {place_of(loss)} "
                "another name"
            )
        if known is None and name in BUILT_IN and loss.__module__ != f"fastkd.losses.{name}":
            raise UserError(f"{name} is a loss of fastkd; give {place_of(loss)} another name")
        if name in OTHER_KEYS:
            raise UserError(f"losses.{name} is no loss; give {place_of(loss)} another name")
        _LOSSES[name] = loss
        note_source(loss)
        return loss

    return register


def _check_loss(name: str, loss: Any) -> None:
    """See that what is to be registered is a loss with all that it takes.

    Raises:
        UserError: it isn't, and what it lacks.
    """
    from fastkd.losses.base import Loss, LossConfig, LossGroup
    from fastkd.losses.counts import DIVISORS

    if not (isinstance(loss, type) and issubclass(loss, Loss)):
        raise UserError(f"the loss {name} is {loss!r:.100}; give a subclass of fastkd's Loss")
    place, config, group, mean_over = place_of(loss), loss.Config, loss.group, loss.mean_over
    if not (isinstance(config, type) and issubclass(config, LossConfig)):
        raise UserError(f"{place}.Config is no subclass of LossConfig; make it one")
    check_annotations(f"{place}.Config", config)
    if group is not None and not (isinstance(group, type) and issubclass(group, LossGroup)):
        raise UserError(f"{place}.group is {group!r:.100}; give a subclass of LossGroup, or None")
    if group is None and loss.forward is Loss.forward:
        raise UserError(f"{place} has no forward; give it one, or a group that has")
    if isinstance(mean_over, str) and mean_over not in DIVISORS:
        raise UserError(
            f"{place}.mean_over is {mean_over!r}; {did_you_mean(mean_over, DIVISORS)}expected one "
            f"of {', '.join(DIVISORS)}"
        )


def is_loss_name(name: object) -> bool:
    """Whether a name can be the key of a loss, and a part of labels in metrics."""
    return (
        isinstance(name, str)
        and name.isascii()
        and name[:1].isalpha()
        and name.replace("-", "").replace("_", "").isalnum()
        and len(name) <= 100
    )


def loss_names() -> tuple[str, ...]:
    """All registered names: fastkd's in their order, then the others' by name."""
    _load_built_in()
    return (*BUILT_IN, *sorted(_LOSSES.keys() - set(BUILT_IN)))


def find_loss(name: str) -> type[Loss] | None:
    """The loss that is registered under a name, if there is one."""
    _load_built_in()
    return _LOSSES.get(name)


def loss_class(name: str) -> type[Loss]:
    """The loss of a name.

    Raises:
        ValueError: there is none, with the name that is nearest.
    """
    found = find_loss(name)
    if found is None:
        names = loss_names()
        raise ValueError(
            f"no loss {name!r}; {did_you_mean(name, names)}expected one of {', '.join(names)}"
        )
    return found


def _load_built_in() -> None:
    for name in BUILT_IN:
        if name not in _LOSSES:
            importlib.import_module(f"fastkd.losses.{name}")
