"""Metrics of resampled examples are those of scikit-learn and SciPy on the examples themselves."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from fastkd.data.tasks.metrics import measure
from fastkd.data.tasks.resampling import (
    _KEPT,
    DRAWS,
    Draws,
    draw_weights,
    drawn_scores,
    mean_over_sets,
)
from fastkd.types import Metric

EXAMPLES = 41
CLASSES: tuple[Metric, ...] = ("accuracy", "f1", "matthews")
SCORES: tuple[Metric, ...] = ("pearson", "spearman")


def _made(metric: Metric) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predictions and labels with ties, that agree now and then."""
    rng = np.random.default_rng(3)
    if metric in CLASSES:
        labels = rng.integers(0, 3, EXAMPLES)
        wrong = rng.random(EXAMPLES) < 0.4
        return np.where(wrong, rng.integers(0, 3, EXAMPLES), labels), labels
    labels = rng.integers(0, 11, EXAMPLES) / 2
    return (labels + rng.normal(0, 2, EXAMPLES)).round(), labels


@pytest.mark.parametrize("metric", [*CLASSES, *SCORES])
def test_a_draw_scores_as_its_examples_do(metric: Metric) -> None:
    predictions, labels = _made(metric)
    weights = draw_weights(EXAMPLES, 25, seed=1)
    assert weights.sum(axis=1).tolist() == [EXAMPLES] * 25
    found = drawn_scores([metric], predictions, labels, weights)
    for counts, score in zip(weights.astype(int), found, strict=True):
        rows = np.repeat(np.arange(EXAMPLES), counts)
        assert score == pytest.approx(measure([metric], predictions[rows], labels[rows])[metric])
    whole = drawn_scores([metric], predictions, labels, np.ones((1, EXAMPLES)))
    assert whole[0] == pytest.approx(measure([metric], predictions, labels)[metric])
    if metric in SCORES:
        # also of spreads far below 1
        small = drawn_scores([metric], predictions / 100, labels / 100, weights)
        assert small == pytest.approx(found)


@pytest.mark.parametrize("metric", [*CLASSES[1:], *SCORES])
def test_one_answer_to_everything_is_worth_nothing(metric: Metric) -> None:
    labels = _made(metric)[1]
    found = drawn_scores([metric], np.full(EXAMPLES, 0.1), labels, draw_weights(EXAMPLES, 9))
    assert found.tolist() == [0.0] * 9


def test_metrics_and_sets_are_averaged() -> None:
    predictions, labels = _made("f1")
    weights = draw_weights(EXAMPLES, 5)
    both, *each = (
        drawn_scores(names, predictions, labels, weights)
        for names in (["f1", "accuracy"], ["f1"], ["accuracy"])
    )
    assert both == pytest.approx(sum(each) / 2)
    assert mean_over_sets(each) == pytest.approx(both)


def test_draws_are_the_same_again_and_no_others() -> None:
    assert (draw_weights(7, 4) == draw_weights(7, 4)).all()
    assert (draw_weights(7, 4) != draw_weights(7, 4, seed=1)).any()


@pytest.mark.parametrize("kept", [70, 69])
def test_draws_come_in_blocks(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.data.tasks.resampling._KEPT", kept)
    monkeypatch.setattr("fastkd.data.tasks.resampling._BLOCK", 30)
    draws = Draws(7, 10)
    for _ in range(2):
        blocks = list(draws)
        assert [block.shape for block in blocks] == [(4, 7), (4, 7), (2, 7)]
        np.testing.assert_array_equal(np.concatenate(blocks), draw_weights(7, 10))
    assert ("_kept" in vars(draws)) == (kept == 70)
    assert [block.shape for block in Draws(40, 2)] == [(1, 40)] * 2


@pytest.mark.parametrize("most", [255, 256, 70_000])
def test_counts_are_kept_in_as_few_bytes_as_hold_them(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = np.array([[0.0, 3.0], [1.0, 2.0], [float(most), 0.0], [2.0, 1.0]])
    given = iter(counts)
    monkeypatch.setattr("fastkd.data.tasks.resampling._BLOCK", 2)
    monkeypatch.setattr(
        "fastkd.data.tasks.resampling.draw_weights", lambda *_: np.stack([next(given)])
    )
    draws = Draws(2, 4)
    for _ in range(2):
        blocks = list(draws)
        assert {block.dtype for block in blocks} == {np.dtype(np.float64)}
        np.testing.assert_array_equal(np.concatenate(blocks), counts)
    assert draws._kept.itemsize == {255: 1, 256: 2, 70_000: 4}[most]


def test_a_set_of_many_examples_is_drawn_once() -> None:
    draws = Draws(2**17 - 1, 3)
    first, again = np.concatenate(list(draws)), np.concatenate(list(draws))
    np.testing.assert_array_equal(first, draw_weights(2**17 - 1, 3))
    np.testing.assert_array_equal(again, first)
    # as many as a thousand draws of a hundred thousand examples
    assert _KEPT >= DRAWS * 100_000


def test_every_metric_of_an_example_is_known() -> None:
    of_words = {"token_accuracy", "entity_f1", "exact_match", "answer_f1"}
    assert {*CLASSES, *SCORES} == set(get_args(Metric)) - of_words
