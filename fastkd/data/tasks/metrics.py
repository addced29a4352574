"""Scores of predictions: the official metrics of GLUE, by scikit-learn and SciPy.

A score that its formula leaves undefined, because all predictions or all labels are the same, is 0:
a model that says one thing only has learnt nothing. Both are imported where they are used: runs on
text need neither, and scikit-learn is of the extra `tasks`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastkd.errors import UserError
from fastkd.types import Metric

Scores = dict[str, float]
Judged = Literal["student", "teacher"]
TEACHER_REMEDY = "give teacher.dtype float32, or a teacher whose weights are whole"
_REMEDY: dict[Judged, str] = {
    "student": "continue from an earlier checkpoint with a smaller train.learning_rate",
    "teacher": TEACHER_REMEDY,
}
_Array = npt.NDArray[np.float64]


def predictions_of(
    outputs: npt.ArrayLike, *, regression: bool, whose: Judged = "student"
) -> npt.NDArray[np.generic]:
    """What a model's outputs predict.

    Args:
        outputs: [examples, classes] logits, or [examples, 1] scores of a regression.
        regression: whether the outputs are scores.
        whose: outputs they are; what to do about them depends on it.

    Returns:
        [examples]: the class with the largest logit, int64, or the score, fp64.

    Raises:
        UserError: an output is not finite.
    """
    values = np.asarray(outputs, dtype=np.float64)
    refuse_broken(int((~np.isfinite(values)).any(axis=1).sum()), len(values), whose)
    return values[:, 0] if regression else values.argmax(axis=1)


def refuse_broken(broken: int, examples: int, whose: Judged) -> None:
    """See that every example had outputs that predict something.

    Args:
        broken: examples that have outputs that are not finite.
        examples: in all.
        whose: outputs they are.

    Raises:
        UserError: some hadn't.
    """
    if broken:
        raise UserError(
            f"the {whose}'s outputs for {broken} of {examples} examples are not finite, so "
            f"nothing is predicted; {_REMEDY[whose]}"
        )


def measure(metrics: Iterable[Metric], predictions: npt.ArrayLike, labels: npt.ArrayLike) -> Scores:
    """Every metric of one evaluation set, between -1 or 0 and 1.

    Args:
        metrics: by name; `f1` is that of class 1 against the others.
        predictions: [examples] classes or scores.
        labels: [examples] of the same kind.

    Raises:
        ValueError: no examples, or predictions and labels of different lengths.
    """
    found = np.asarray(predictions, dtype=np.float64)
    right = np.asarray(labels, dtype=np.float64)
    if found.shape != right.shape or found.ndim != 1 or not found.size:
        raise ValueError(
            f"predictions are {list(found.shape)} and labels {list(right.shape)}, expected the "
            "same number of examples, at least one"
        )
    return {name: _METRICS[name](found, right) for name in metrics}


def task_score(results: Mapping[str, Mapping[str, float]]) -> float:
    """One number for a task: the mean over its evaluation sets of the mean of their metrics.

    GLUE (arXiv 1804.07461, section 3) averages the metrics of a task that has two, and
    MNLI's matched and mismatched sets count as one task.
    """
    return fmean(fmean(scores.values()) for scores in results.values())


def constant_scores(
    metrics: Sequence[Metric], labels: Mapping[str, npt.ArrayLike], outputs: int
) -> dict[str, Scores]:
    """Scores of the best one answer to everything: what knowing nothing is worth.

    That is mostly the largest class; its Matthews correlation, and that of any score, is 0.

    Args:
        metrics: of the task.
        labels: of each evaluation set, classes or scores.
        outputs: numbers that a model gives an example: classes, or 1 of a regression.

    Returns:
        Of each evaluation set its scores by metric, all of the answer with the best `task_score`.
    """
    sets = {name: np.asarray(right, dtype=np.float64) for name, right in labels.items()}
    answers = (
        {n: measure(metrics, np.full_like(r, answer), r) for n, r in sets.items()}
        for answer in _worth_trying(list(sets.values()), outputs)
    )
    return max(answers, key=task_score)


def _worth_trying(sets: Sequence[_Array], outputs: int) -> list[int]:
    """Answers worth trying as the one to everything: no metric but accuracy and the F1 of class 1
    is ever above 0."""
    if outputs == 1:
        return [0]
    shares = [np.bincount(right.astype(np.int64), minlength=outputs) / right.size for right in sets]
    return sorted({1, int(np.argmax(sum(shares)))})


def f1_by_class(
    predictions: npt.ArrayLike, labels: npt.ArrayLike, names: Sequence[str]
) -> dict[str, float]:
    """F1 of each class against all others; 0 of one that nobody predicts and no label is.

    Args:
        predictions: [examples] classes.
        labels: [examples] classes.
        names: of the classes, class 0 first.
    """
    import sklearn.metrics

    found = sklearn.metrics.f1_score(
        labels, predictions, labels=range(len(names)), average=None, zero_division=0.0
    )
    return dict(zip(names, found.tolist(), strict=True))


def _undefined(predictions: _Array, labels: _Array) -> bool:
    return any((values == values[0]).all() for values in (predictions, labels))


def _matthews(predictions: _Array, labels: _Array) -> float:
    if _undefined(predictions, labels):
        return 0.0
    import sklearn.metrics

    return float(sklearn.metrics.matthews_corrcoef(labels, predictions))


def _accuracy(predictions: _Array, labels: _Array) -> float:
    import sklearn.metrics

    return float(sklearn.metrics.accuracy_score(labels, predictions))


def _f1(predictions: _Array, labels: _Array) -> float:
    import sklearn.metrics

    hits, positive = (predictions == 1).astype(int), (labels == 1).astype(int)
    return float(sklearn.metrics.f1_score(positive, hits, zero_division=0.0))


def _correlation(name: Literal["pearsonr", "spearmanr"]) -> Callable[[_Array, _Array], float]:
    def correlate(predictions: _Array, labels: _Array) -> float:
        if _undefined(predictions, labels):
            return 0.0
        import scipy.stats

        with warnings.catch_warnings():
            # scores that hardly differ are what an untrained model gives
            warnings.simplefilter("ignore", scipy.stats.NearConstantInputWarning)
            return float(getattr(scipy.stats, name)(predictions, labels)[0])

    return correlate


_METRICS: dict[Metric, Callable[[_Array, _Array], float]] = {
    "matthews": _matthews,
    "accuracy": _accuracy,
    "f1": _f1,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
