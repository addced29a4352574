"""From what a recipe says to the mapping in force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from fastkd.errors import UserError
from fastkd.layer_map.base import LayerMap
from fastkd.layer_map.checks import check_map
from fastkd.layer_map.many_to_one import (
    AttentionMap,
    MeanLossMap,
    MeanTargetMap,
    TransportMap,
)
from fastkd.layer_map.one_to_one import (
    BelowLastMap,
    ExplicitMap,
    FinalMap,
    FirstMap,
    LastMap,
    SkipMap,
    UniformMap,
)
from fastkd.layer_map.pairs import PairsMap
from fastkd.layer_map.random_map import RandomMap
from fastkd.layer_map.registry import build_registered
from fastkd.layer_map.sections import (
    AttentionSection,
    MapConfig,
    PairsSection,
    RandomSection,
    TransportSection,
)

Given: TypeAlias = str | Sequence[int] | MapConfig

_NAMED: dict[str, Callable[[int, int], LayerMap]] = {
    "uniform": UniformMap,
    "last": LastMap,
    "first": FirstMap,
    "skip": SkipMap,
    "below_last": BelowLastMap,
    "final": FinalMap,
    "mean_target": MeanTargetMap,
    "mean_loss": MeanLossMap,
}


def make_layer_map(
    given: Given, student_layers: int, teacher_layers: int, *, seed: int = 0
) -> LayerMap:
    """Build the mapping for a student of N blocks and a teacher of M.

    The classes of this folder say what each kind is, or those that `register_layer_map` was given.
    A sequence names one teacher layer for each student layer, 0 for none.

    Args:
        given: what the recipe says.
        student_layers: N.
        teacher_layers: M.
        seed: of the draws of a random map that names none, the run's.

    Raises:
        UserError: a student deeper than its teacher, a sequence of another length than the student,
            a layer that a model doesn't have, or a class from outside that is no whole mapping.
    """
    if student_layers > teacher_layers:
        raise UserError(
            f"student.layers is {student_layers}, but the teacher has {teacher_layers} layers; "
            "give a student that is not deeper"
        )
    depths = student_layers, teacher_layers
    if isinstance(given, RandomSection):
        return RandomMap(*depths, given.redraw, seed if given.seed is None else given.seed)
    if isinstance(given, TransportSection):
        return TransportMap(*depths, given.layer_weights, given.temperature, given.total)
    if isinstance(given, AttentionSection):
        return AttentionMap(*depths, given.temperature)
    layers: LayerMap
    if isinstance(given, PairsSection):
        pairs = tuple((pair.student, pair.teacher, pair.weight) for pair in given.pairs)
        layers = PairsMap(*depths, pairs)
    elif isinstance(given, MapConfig):
        layers = build_registered(given, *depths)
    elif isinstance(given, str):
        layers = _NAMED[given](*depths)
    else:
        _check_list(given, *depths)
        layers = ExplicitMap(*depths, tuple(given))
    check_map(layers, getattr(given, "kind", given))
    return layers


def _check_list(given: Sequence[int], student_layers: int, teacher_layers: int) -> None:
    if len(given) != student_layers:
        raise UserError(
            f"layer_map names {len(given)} teacher layers, but student.layers is "
            f"{student_layers}; give one for each student layer, 0 for none"
        )
    for student, teacher in enumerate(given, start=1):
        if not 0 <= teacher <= teacher_layers:
            raise UserError(
                f"layer_map sends student layer {student} to teacher layer {teacher}, but the "
                f"teacher's layers are 1 to {teacher_layers}; 0 is for none"
            )
