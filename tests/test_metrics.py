"""Metrics against their formulas, and what they say where the formula says nothing."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from fastkd.data.tasks.metrics import (
    Metric,
    constant_scores,
    f1_by_class,
    measure,
    predictions_of,
    task_score,
)
from fastkd.errors import UserError

ALL_CLASS: tuple[Metric, ...] = ("matthews", "accuracy", "f1")
BOTH: tuple[Metric, ...] = ("pearson", "spearman")


@pytest.mark.parametrize("seed", range(5))
def test_class_metrics_equal_their_formulas(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, 50)
    found = np.where(generator.random(50) < 0.7, labels, 1 - labels)
    hit = int(((found == 1) & (labels == 1)).sum())
    rejected = int(((found == 0) & (labels == 0)).sum())
    false_hit = int(((found == 1) & (labels == 0)).sum())
    missed = int(((found == 0) & (labels == 1)).sum())
    rows = (hit + false_hit) * (hit + missed) * (rejected + false_hit) * (rejected + missed)
    scores = measure(ALL_CLASS, found, labels)
    assert scores == pytest.approx(
        {
            "matthews": (hit * rejected - false_hit * missed) / math.sqrt(rows),
            "accuracy": (hit + rejected) / 50,
            "f1": 2 * hit / (2 * hit + false_hit + missed),
        },
        abs=1e-12,
    )
    assert len({round(value, 6) for value in scores.values()}) == 3


@pytest.mark.parametrize("seed", range(5))
def test_correlations_equal_their_formulas(seed: int) -> None:
    generator = np.random.default_rng(seed)
    # ties, as in the scores of STS-B
    labels = generator.integers(0, 6, 40) * 1.0
    found = np.round(labels + generator.normal(size=40), 1) ** 3

    def pearson(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))

    def ranks(a: np.ndarray) -> np.ndarray:
        return np.array([((a < x).sum() + (a <= x).sum() + 1) / 2 for x in a])

    scores = measure(BOTH, found, labels)
    assert scores["pearson"] == pytest.approx(pearson(found, labels), abs=1e-12)
    assert scores["spearman"] == pytest.approx(pearson(ranks(found), ranks(labels)), abs=1e-12)
    assert abs(scores["pearson"] - scores["spearman"]) > 1e-3


def test_f1_is_that_of_class_one() -> None:
    labels = [1, 1, 1, 0]
    assert measure(["f1"], [1, 1, 1, 1], labels)["f1"] == pytest.approx(6 / 7)
    assert measure(["f1"], [0, 0, 0, 0], labels)["f1"] == 0
    # no class 1 anywhere leaves the formula undefined
    assert measure(["f1"], [0, 0], [0, 0])["f1"] == 0


def test_every_class_has_an_f1() -> None:
    generator = np.random.default_rng(0)
    labels, found = generator.integers(0, 3, 60), generator.integers(0, 3, 60)
    scores = f1_by_class(found, labels, ["a", "b", "c", "none"])
    for number, name in enumerate("abc"):
        hit = int(((found == number) & (labels == number)).sum())
        wrong = int(((found == number) != (labels == number)).sum())
        assert scores[name] == pytest.approx(2 * hit / (2 * hit + wrong), abs=1e-12)
    # a class that is nowhere leaves the formula undefined
    assert scores["none"] == 0
    assert scores["b"] != pytest.approx(scores["c"])


def test_three_classes_have_accuracy_and_matthews() -> None:
    assert measure(["accuracy"], [0, 1, 2, 2], [0, 1, 2, 1]) == {"accuracy": 0.75}
    assert measure(["matthews"], [0, 1, 2], [0, 1, 2])["matthews"] == pytest.approx(1)


@pytest.mark.parametrize("constant", [[1, 1, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_undefined_is_zero_and_says_nothing(constant: list[int], swapped: bool) -> None:
    pair = ([0, 1, 1, 0], constant) if swapped else (constant, [0, 1, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = measure(("matthews", *BOTH), *pair)
        assert scores == {"matthews": 0, "pearson": 0, "spearman": 0}
        assert measure(("matthews", *BOTH), constant, constant) == scores
        assert measure(BOTH, [0.5], [0.1]) == {"pearson": 0, "spearman": 0}


def test_nearly_constant_scores_say_nothing_either() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = measure(BOTH, 1 + 1e-15 * np.arange(4.0), [0.0, 1, 2, 3])
    assert scores["spearman"] == pytest.approx(1)


def test_tensors_are_taken() -> None:
    outputs = torch.tensor([[0.1, 2.0], [3.0, -1.0], [0.0, 0.5]])
    found = predictions_of(outputs, regression=False)
    assert found.tolist() == [1, 0, 1]
    assert found.dtype == np.int64
    assert measure(["accuracy"], found, torch.tensor([1, 0, 0])) == {"accuracy": 2 / 3}
    assert predictions_of(torch.tensor([[0.5], [4.0]]), regression=True).tolist() == [0.5, 4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_predict_nothing(bad: float) -> None:
    outputs = [[0.1, 0.2], [bad, bad]]
    with pytest.raises(UserError, match="student's outputs for 1 of 2 examples are not finite"):
        predictions_of(outputs, regression=False)
    with pytest.raises(
        UserError, match=r"the teacher's outputs for 1 of 2 .* teacher.dtype float3"
    ):
        predictions_of(outputs, regression=False, whose="teacher")


def test_the_score_of_a_task_is_the_mean_of_its_means() -> None:
    mrpc = {"dev": {"f1": 0.9, "accuracy": 0.8}}
    assert task_score(mrpc) == pytest.approx(0.85)
    mnli = {"dev_matched": {"accuracy": 0.8}, "dev_mismatched": {"accuracy": 0.6}}
    assert task_score(mnli) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("found", "labels"), [([], []), ([1, 0], [1]), ([[1], [0]], [[1], [0]])], ids=str
)
def test_predictions_and_labels_must_fit(found: list[int], labels: list[int]) -> None:
    with pytest.raises(ValueError, match="expected the same number of examples"):
        measure(["accuracy"], found, labels)


@pytest.mark.parametrize("metrics", [("accuracy",), ("accuracy", "f1"), ("matthews", "f1")])
def test_the_best_one_answer_is_the_best_of_all(metrics: tuple[Metric, ...]) -> None:
    """Of which only some are tried: of very many classes each would be a pass over the labels."""
    drawn = np.random.default_rng(0)
    for classes in (2, 3, 7):
        labels = {name: drawn.integers(0, classes, 30) for name in ("a", "b")}
        every = [
            {name: measure(metrics, np.full(30, answer), of) for name, of in labels.items()}
            for answer in range(classes)
        ]
        assert constant_scores(metrics, labels, classes) == max(every, key=task_score)


def test_the_best_one_answer_weighs_sets_alike_whatever_their_size() -> None:
    labels = {"small": [0] * 3, "large": [2] * 8 + [0] * 4}
    expected = {"small": {"accuracy": 1.0}, "large": {"accuracy": 1 / 3}}
    assert constant_scores(["accuracy"], labels, 3) == expected
