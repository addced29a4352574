"""Scores of resampled examples: a task's metrics on many draws of its evaluation set at once.

A draw takes as many examples as the set has, with replacement (Efron, Annals of Statistics 7, 1979,
section 2); how often it took each is a weight. The metrics are those of `data.tasks.metrics`,
written with weights: hits and classes are counted, moments weighted, ranks those among what was
drawn, ties in the middle. Where a metric is undefined it is 0, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fastkd.types import Metric

Array = npt.NDArray[np.float64]

DRAWS = 1000
"""Draws of a set: the spread of so many is known to about 2 %."""
_KEPT = 2**27
"""As many weights of a set are kept, a byte each; those of more are drawn anew every time."""
_BLOCK = 2**17
"""As many are given at a time: what a metric makes of them stays in a processor's cache."""


def draw_weights(examples: int, draws: int = DRAWS, seed: int | np.random.Generator = 0) -> Array:
    """How often each draw takes each example, [draws, examples]; the same for all that is compared.

    Args:
        examples: of the set.
        draws: how many.
        seed: of the draws, or what goes on drawing.
    """
    shares = np.full(examples, 1 / examples)
    counts = np.random.default_rng(seed).multinomial(examples, shares, size=draws)
    return counts.astype(np.float64)


class Draws:
    """The draws of a set in blocks of `draw_weights`, however large it is; the same every time."""

    def __init__(self, examples: int, draws: int = DRAWS) -> None:
        self._examples, self._draws = examples, draws

    def __iter__(self) -> Iterator[Array]:
        if self._examples * self._draws > _KEPT:
            yield from self._drawn()
            return
        rows = self._rows
        for first in range(0, self._draws, rows):
            yield self._kept[first : first + rows].astype(np.float64)

    @property
    def _rows(self) -> int:
        return max(1, _BLOCK // self._examples)

    def _drawn(self) -> Iterator[Array]:
        rng = np.random.default_rng(0)
        for first in range(0, self._draws, self._rows):
            yield draw_weights(self._examples, min(self._rows, self._draws - first), rng)

    @cached_property
    def _kept(self) -> npt.NDArray[np.unsignedinteger]:
        kept = np.empty((self._draws, self._examples), dtype=np.uint8)
        first = 0
        for block in self._drawn():
            # a byte holds what draws come to; should one ever be more, all become wider
            needed = np.min_scalar_type(int(block.max()))
            kept = kept.astype(np.promote_types(kept.dtype, needed), copy=False)
            kept[first : first + len(block)] = block
            first += len(block)
        return kept


def drawn_scores(
    metrics: Sequence[Metric], predictions: npt.ArrayLike, labels: npt.ArrayLike, weights: Array
) -> Array:
    """The mean of a task's metrics on every draw, [draws].

    Args:
        metrics: by name; `f1` is that of class 1 against the others.
        predictions: [examples] classes or scores.
        labels: [examples] of the same kind.
        weights: [draws, examples] from `draw_weights`.
    """
    found = np.asarray(predictions, dtype=np.float64)
    right = np.asarray(labels, dtype=np.float64)
    made: Array = np.mean([_METRICS[name](found, right, weights) for name in metrics], axis=0)
    return made


def mean_over_sets(by_set: Sequence[Array]) -> Array:
    """A task's score on every draw, of those of its evaluation sets, as `task_score` has it."""
    made: Array = np.mean(by_set, axis=0)
    return made


def _accuracy(found: Array, right: Array, weights: Array) -> Array:
    hits: Array = weights @ (found == right) / weights.sum(axis=1)
    return hits


def _f1(found: Array, right: Array, weights: Array) -> Array:
    hits = weights @ ((found == 1) & (right == 1))
    named = weights @ (found == 1) + weights @ (right == 1)
    return _ratio(2 * hits, named)


def _matthews(found: Array, right: Array, weights: Array) -> Array:
    """Matthews correlation of any number of classes (Gorodkin, Computational Biology and Chemistry
    28, 2004, eq. 8)."""
    classes = np.unique([found, right])
    said = np.stack([weights @ (found == c) for c in classes])
    there = np.stack([weights @ (right == c) for c in classes])
    hits, total = weights @ (found == right), weights.sum(axis=1)
    spreads = (total**2 - (said**2).sum(axis=0)) * (total**2 - (there**2).sum(axis=0))
    return _ratio(hits * total - (said * there).sum(axis=0), np.sqrt(spreads))


def _pearson(found: Array, right: Array, weights: Array) -> Array:
    return _correlation(found - found[0], right - right[0], weights)


def _spearman(found: Array, right: Array, weights: Array) -> Array:
    return _correlation(_ranks(found, weights), _ranks(right, weights), weights)


def _ranks(values: Array, weights: Array) -> Array:
    """Rank of each example among those of its draw, [draws, examples]; equal ones share theirs."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: Array = (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group]
    return ranks


def _correlation(found: Array, right: Array, weights: Array) -> Array:
    """Pearson's, of values that are small against their spread."""
    total = weights.sum(axis=1)

    def mean(values: Array) -> Array:
        # without a product of that size
        made: Array = np.einsum("de,de->d", weights, np.broadcast_to(values, weights.shape)) / total
        return made

    means = mean(found), mean(right)
    shared = mean(found * right) - means[0] * means[1]
    spreads = mean(found**2) - means[0] ** 2, mean(right**2) - means[1] ** 2
    return _ratio(shared, np.sqrt(np.maximum(spreads[0], 0) * np.maximum(spreads[1], 0)))


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


_METRICS: dict[Metric, Callable[[Array, Array, Array], Array]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
