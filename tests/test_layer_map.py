"""The mapping in force, as tables."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from fastkd.errors import UserError
from fastkd.layer_map import LayerMap, MapKind, make_layer_map


def targets(layers: LayerMap) -> list[int]:
    """The teacher layer of each student layer, 0 for none."""
    return [teacher or 0 for _, teacher in layers.rows()]


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, [3, 6, 9, 12]),
        ("uniform", 5, 12, [2, 5, 7, 10, 12]),
        ("uniform", 6, 12, [2, 4, 6, 8, 10, 12]),
        ("uniform", 3, 6, [2, 4, 6]),
        ("uniform", 3, 7, [2, 5, 7]),
        ("uniform", 3, 22, [7, 15, 22]),
        # a tie, 1.5, is rounded up
        ("uniform", 2, 3, [2, 3]),
        ("uniform", 12, 12, list(range(1, 13))),
        ("uniform", 1, 6, [6]),
        ("last", 4, 12, [9, 10, 11, 12]),
        ("last", 3, 7, [5, 6, 7]),
        ("last", 12, 12, list(range(1, 13))),
        ("first", 4, 12, [1, 2, 3, 4]),
        ("first", 3, 7, [1, 2, 3]),
        ("skip", 6, 12, [2, 4, 6, 8, 10, 0]),
        ("skip", 4, 12, [3, 6, 9, 0]),
        ("skip", 5, 12, [2, 4, 6, 8, 0]),
        ("skip", 3, 7, [2, 4, 0]),
        ("skip", 12, 12, [*range(1, 12), 0]),
    ],
)
def test_named_maps(kind: MapKind, student: int, teacher: int, expected: list[int]) -> None:
    assert targets(make_layer_map(kind, student, teacher)) == expected


@pytest.mark.parametrize("kind", ["uniform", "last", "first", "skip"])
@pytest.mark.parametrize("teacher", range(2, 25))
def test_named_maps_climb_and_stay_inside_the_teacher(kind: MapKind, teacher: int) -> None:
    for student in range(2, teacher + 1):
        matched = [t for _, t in make_layer_map(kind, student, teacher).pairs]
        assert matched == sorted(set(matched))
        assert 1 <= matched[0] <= matched[-1] <= teacher


@pytest.mark.parametrize("given", [(3, 0, 12), [3, 0, 12]])
def test_an_explicit_map_leaves_zeros_unmatched(given: list[int] | tuple[int, ...]) -> None:
    layers = make_layer_map(given, 3, 12)
    assert layers.pairs == ((1, 3), (3, 12))
    assert layers.rows() == [(1, 3), (2, None), (3, 12)]


def test_an_explicit_map_may_repeat_and_descend() -> None:
    assert targets(make_layer_map([6, 6, 1], 3, 6)) == [6, 6, 1]


@pytest.mark.parametrize(
    ("given", "expected"), [("uniform", 12), ("first", 4), ("skip", 9), ([7, 2, 0, 0], 7)]
)
def test_the_teacher_is_needed_up_to_its_deepest_match(
    given: MapKind | list[int], expected: int
) -> None:
    assert make_layer_map(given, 4, 12).teacher_depth == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("uniform", (3, 6, 9, 12)),
        ("first", (1, 2, 3, 4)),
        # an unmatched layer starts from the one that the uniform map names
        ("skip", (3, 6, 9, 12)),
        ([0, 1, 0, 2], (3, 1, 9, 2)),
    ],
)
def test_every_student_layer_has_a_layer_to_start_from(
    given: MapKind | list[int], expected: tuple[int, ...]
) -> None:
    assert make_layer_map(given, 4, 12).sources() == expected


def test_a_map_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        make_layer_map("uniform", 3, 6).student_layers = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "student", "teacher", "expected"),
    [
        ("uniform", 7, 6, "student.layers is 7, but the teacher has 6 layers; give a student"),
        ([1, 7], 2, 6, "student layer 2 to teacher layer 7, but the teacher's layers are 1 to 6"),
        ([-1, 2], 2, 6, "student layer 1 to teacher layer -1, .* 0 is for none"),
        ([0, 0], 2, 6, r"layer_map \[0, 0\] matches no layer .* at least one pair"),
        ("skip", 1, 6, "layer_map skip matches no layer of a 1-layer student"),
        ([1], 2, 6, "layer_map names 1 teacher layers, but student.layers is 2"),
    ],
)
def test_impossible_maps_say_why(
    given: MapKind | list[int], student: int, teacher: int, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        make_layer_map(given, student, teacher)
