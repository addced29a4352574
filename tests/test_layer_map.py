"""The mapping in force, as tables."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.errors import UserError
from fastkd.layer_map import LayerMap, MapKind, Progress, Transport, make_layer_map, sections
from fastkd.layer_map.emd import Matrix, exact_flow

NOW = Progress()


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


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "expected"),
    [
        ("below_last", 6, 12, [7, 8, 9, 10, 11, 0]),
        ("below_last", 3, 7, [5, 6, 0]),
        ("final", 3, 7, [0, 0, 7]),
        ("final", 1, 6, [6]),
    ],
)
def test_maps_that_leave_layers_free(
    kind: MapKind, student: int, teacher: int, expected: list[int]
) -> None:
    assert targets(make_layer_map(kind, student, teacher)) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "blocks"),
    [
        (4, 12, [(1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)]),
        (3, 7, [(1, 2), (3, 4, 5), (6, 7)]),
        (2, 3, [(1, 2), (3,)]),
        (1, 4, [(1, 2, 3, 4)]),
    ],
)
def test_means_cut_the_teacher_into_blocks(
    student: int, teacher: int, blocks: list[tuple[int, ...]]
) -> None:
    as_target = make_layer_map("mean_target", student, teacher).links(NOW)
    assert [link.teachers for link in as_target] == blocks
    assert {link.weight for link in as_target} == {1.0}
    as_loss = make_layer_map("mean_loss", student, teacher).links(NOW)
    expected = [(s, (t,), 1 / len(b)) for s, b in enumerate(blocks, start=1) for t in b]
    assert [tuple(link) for link in as_loss] == expected


def test_many_to_many_maps_link_every_pair() -> None:
    links = make_layer_map(sections.TransportSection(), 2, 3).links(NOW)
    assert [(link.student, link.teachers) for link in links] == [
        (s, (t,)) for s in (1, 2) for t in (1, 2, 3)
    ]
    assert sum(link.weight for link in links) == pytest.approx(1)
    heavier = make_layer_map(sections.TransportSection(total=2), 2, 3).links(NOW)
    assert sum(link.weight for link in heavier) == pytest.approx(2)
    mixed = make_layer_map(sections.AttentionSection(), 2, 3).links(NOW)
    assert [tuple(link) for link in mixed] == [(1, (1, 2, 3), 1.0), (2, (1, 2, 3), 1.0)]


@pytest.mark.parametrize(
    ("given", "labels", "rows"),
    [
        ("uniform", ["1-2", "2-4"], [2, 4]),
        ("mean_target", ["1-1..2", "2-3..4"], ["mean of 1..2", "mean of 3..4"]),
        (
            "mean_loss",
            ["1-1", "1-2", "2-3", "2-4"],
            ["1..2, mean of losses", "3..4, mean of losses"],
        ),
        (sections.RandomSection(), ["1-*", "2-*"], ["random, drawn every epoch"] * 2),
        (sections.AttentionSection(), ["1-1..4", "2-1..4"], ["1..4, by attention"] * 2),
        (
            sections.TransportSection(),
            [f"{s}-{t}" for s in (1, 2) for t in (1, 2, 3, 4)],
            ["1..4, by transport"] * 2,
        ),
    ],
    ids=str,
)
def test_every_map_names_its_links_and_says_what_it_is(
    given: Any, labels: list[str], rows: list[object]
) -> None:
    layers = make_layer_map(given, 2, 4)
    assert list(layers.labels()) == labels
    assert [row for _, row in layers.rows()] == rows
    assert len(layers.links(Progress(7, 3))) == len(labels)


@pytest.mark.parametrize("given", ["mean_target", "mean_loss", "random", "emd", "attention"])
def test_students_of_many_layers_start_from_the_uniform_ones(given: str) -> None:
    parsed = sections.MAP_SECTIONS[given]() if given in sections.MAP_SECTIONS else given
    assert make_layer_map(parsed, 3, 7).sources() == (2, 5, 7)


@pytest.mark.parametrize("redraw", ["run", "epoch", "step"])
def test_a_draw_is_sorted_distinct_and_changes_when_it_should(redraw: Any) -> None:
    layers = make_layer_map(sections.RandomSection(redraw=redraw, seed=3), 4, 12)
    moments = [Progress(step, step // 10) for step in range(200)]
    draws = [tuple(link.teachers[0] for link in layers.links(m)) for m in moments]
    for draw in draws:
        assert list(draw) == sorted(set(draw))
        assert 1 <= draw[0] <= draw[-1] <= 12
    changes = sum(a != b for a, b in itertools.pairwise(draws))
    assert changes == {"run": 0}.get(redraw, changes)
    assert redraw == "run" or changes >= {"epoch": 15, "step": 190}[redraw]
    if redraw == "epoch":
        assert changes <= 19
    again = make_layer_map(sections.RandomSection(redraw=redraw, seed=3), 4, 12)
    assert [tuple(link.teachers[0] for link in again.links(m)) for m in moments] == draws
    of_run = make_layer_map(sections.RandomSection(redraw=redraw), 4, 12, seed=3)
    assert [tuple(link.teachers[0] for link in of_run.links(m)) for m in moments] == draws
    other = make_layer_map(sections.RandomSection(redraw=redraw, seed=4), 4, 12, seed=3)
    assert [tuple(link.teachers[0] for link in other.links(m)) for m in moments] != draws


def test_every_layer_is_drawn_equally_often() -> None:
    layers = make_layer_map(sections.RandomSection(redraw="step"), 3, 12)
    drawn = Counter(
        link.teachers[0] for step in range(4000) for link in layers.links(Progress(step))
    )
    # 1000 of each expected, with a standard deviation of 27
    assert all(880 < drawn[layer] < 1120 for layer in range(1, 13))


def test_a_run_without_redraws_needs_the_teacher_no_deeper_than_its_draw() -> None:
    kept = make_layer_map(sections.RandomSection(redraw="run", seed=1), 2, 12)
    assert kept.teacher_depth == max(link.teachers[0] for link in kept.links(NOW))
    assert make_layer_map(sections.RandomSection(), 2, 12).teacher_depth == 12
    assert kept.sources() == tuple(link.teachers[0] for link in kept.links(NOW))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.integers(n, 12).flatmap(
            lambda m: st.tuples(
                st.lists(st.floats(0, 5), min_size=n * m, max_size=n * m),
                st.lists(st.floats(0.05, 1), min_size=n, max_size=n),
                st.lists(st.floats(0.05, 1), min_size=m, max_size=m),
            )
        )
    )
)
def test_the_flow_is_as_cheap_as_that_of_another_exact_solver(
    drawn: tuple[list[float], list[float], list[float]],
) -> None:
    entries, supply, demand = (np.array(values) for values in drawn)
    cost = entries.reshape(len(supply), len(demand))
    supply, demand = supply / supply.sum(), demand / demand.sum()
    flow = exact_flow(cost, supply, demand)
    assert (flow >= 0).all()
    np.testing.assert_allclose(flow.sum(1), supply, atol=1e-9)
    np.testing.assert_allclose(flow.sum(0), demand, atol=1e-9)
    assert (flow * cost).sum() == pytest.approx(ot.emd2(supply, demand, cost), rel=1e-7, abs=1e-9)


def test_cost_attention_gives_cheap_layers_their_part_of_the_scores() -> None:
    """As the official code of BERT-EMD has it: (sum / own unit cost), divided by its sum."""
    transport = Transport.even(1, 3)
    cost = np.array([[1.0, 2.0, 4.0]])
    flow = transport.flow(cost)
    np.testing.assert_allclose(flow, [[1 / 3, 1 / 3, 1 / 3]], atol=1e-12)
    transport.attend([cost], [flow])
    # unit costs 1, 2, 4: scores 7, 3.5, 1.75
    np.testing.assert_allclose(transport.teacher, np.array([7, 3.5, 1.75]) / 12.25, rtol=1e-9)
    np.testing.assert_allclose(transport.student, [1.0])


def official_rule(spent: Matrix, weights: Matrix, axis: int) -> Matrix:
    unit = spent.sum(axis=axis) / weights
    scores = unit.sum() / unit
    return scores / scores.sum()


def test_layer_weights_stay_calm_on_costs_that_stay() -> None:
    """Of a teacher whose layers differ in size, as MiniLM's: no layer takes or loses nearly all."""
    cost = np.array([2.0, 2.6, 1.4, 2.2, 1.9, 0.8]) * np.array([[1.0], [1.3], [0.9]])
    transport = Transport.even(3, 6)
    expected = transport.student, transport.teacher
    for _ in range(5):
        flow = transport.flow(cost)
        spent = cost * flow
        expected = official_rule(spent, expected[0], 1), official_rule(spent, expected[1], 0)
        transport.attend([cost], [flow])
        np.testing.assert_allclose(transport.student, expected[0], rtol=1e-9)
        np.testing.assert_allclose(transport.teacher, expected[1], rtol=1e-9)
        assert transport.teacher.max() < 0.5 and transport.teacher.min() > 0.05


def test_layer_weights_of_several_losses_are_the_mean_of_each_ones() -> None:
    costs = [np.array([[1.0, 2.0, 4.0], [3.0, 1.0, 2.0]]), np.array([[5.0, 1, 1], [1, 2, 9]])]
    both = Transport.even(2, 3)
    flows = [both.flow(cost) for cost in costs]
    both.attend(costs, flows)
    each = [Transport.even(2, 3) for _ in costs]
    for one, cost, flow in zip(each, costs, flows, strict=True):
        one.attend([cost], [flow])
    np.testing.assert_allclose(both.student, (each[0].student + each[1].student) / 2)
    np.testing.assert_allclose(both.teacher, (each[0].teacher + each[1].teacher) / 2)
    assert both.student.sum() == pytest.approx(1)


@pytest.mark.parametrize("deeper", [1, 4])
def test_the_softmax_of_cost_attention_does_not_sharpen_with_depth(deeper: int) -> None:
    cost = np.tile([1.0, 2.0, 4.0], deeper)[None]
    transport = Transport.even(1, 3 * deeper)
    transport.attend([cost], [transport.flow(cost)], temperature=2.0)
    # over the mean unit cost, 7 / 3
    powers = np.tile(np.exp(np.array([7 / 3, 7 / 6, 7 / 12]) / 2), deeper)
    np.testing.assert_allclose(transport.teacher, powers / powers.sum(), rtol=1e-9)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_cost_attention_survives_layers_that_cost_nothing(temperature: float | None) -> None:
    transport = Transport.even(2, 2)
    for cost in (np.zeros((2, 2)), np.array([[0.0, 1.0], [1.0, 3.0]])):
        flow = transport.flow(cost)
        transport.attend([cost], [flow], temperature)
        for weights in (transport.student, transport.teacher):
            assert np.isfinite(weights).all() and (weights > 0).all()
            assert weights.sum() == pytest.approx(1)
