"""How conditions compare: means over seeds, and intervals of differences over seeds and examples.

What is paired: two conditions meet the same data, initial weights and order of batches where task
and seed agree, and are scored on the same examples, so their difference is free of those. Levels of
other axes are averaged within a task and seed first.

An interval has two sources, seeds and evaluation examples, which are crossed: every seed is scored
on the same examples. The spread between seeds is that of their means over all tasks, for a seed may
mean something to several tasks; that between examples is bootstrapped within each task
(`data.tasks.resampling`). What both contribute together is in the spread between seeds already and
taken out of the other, as an analysis of variance has it (Searle, Casella and McCulloch, "Variance
Components", 1992, chapter 4). The sum is read by Student's t with the degrees of freedom of
Welch and Satterthwaite (Biometrics Bulletin 2, 1946). Resampling five or ten seeds as well would
give intervals that are too short: they have ten of a normal spread's values and none of its tails.

A p of a difference is that of its interval, or of flipping signs with the seed as the unit where
that is larger; one of equivalence is of two one-sided tests (Schuirmann, Journal of
Pharmacokinetics and Biopharmaceutics 15, 1987). Which of them counts is said by a study's
hypotheses, and Holm's procedure (Scandinavian Journal of Statistics 6, 1979) covers all of these.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from scipy import stats

from fastkd.data.tasks.resampling import Array

LEVEL = 0.05
"""What a corrected p is at most where a hypothesis is answered."""
# below this a spread is taken for rounding
_LEAST_SPREAD = 1e-15
# flips of more seeds than this are drawn, of fewer all are tried
_EXACT_SEEDS = 16
_Cell = tuple[str | None, tuple[str, ...]]


@dataclass(frozen=True)
class Score:
    """One finished run, as a comparison sees it."""

    level: str
    """What is compared."""
    others: tuple[str, ...]
    """Levels of the other axes."""
    task: str | None
    seed: int
    value: float
    run: str = ""
    """The run's key."""
    drawn: Array | None = None
    """[draws] the same of resampled examples, where predictions are kept."""


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation over seeds."""

    seeds: int
    """Seeds for which every run is there."""
    mean: float | None
    """`None` without seeds."""
    deviation: float | None
    """Standard deviation of a sample, with n - 1; `None` with fewer than two seeds."""

    def __str__(self) -> str:
        if self.mean is None:
            return "0 seeds"
        if self.deviation is None:
            return f"{self.mean:.4g} (1 seed)"
        places = decimals(self.deviation)
        if places is None:
            return f"{self.mean:.4g} ± 0"
        return f"{self.mean:.{places}f} ± {self.deviation:.{places}f}"


@dataclass(frozen=True)
class Sample:
    """A number of one task with every seed: a score, or a difference of two."""

    values: Array
    """[seeds]."""
    drawn: Array | None = None
    """[seeds, draws] the same of resampled examples."""

    def __sub__(self, other: Sample) -> Sample:
        drawn = None
        if self.drawn is not None and other.drawn is not None:
            drawn = self.drawn - other.drawn
        return Sample(self.values - other.values, drawn)


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, seeds and examples, and how well it is known."""

    by_seed: tuple[float, ...]
    """Its mean over tasks with every seed, two at least."""
    example_variance: float
    """Variance of the mean by the examples alone."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.by_seed))

    @property
    def error(self) -> float:
        """Standard error."""
        return self._error(len(self.by_seed))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the error."""
        return self._freedom(len(self.by_seed))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Its ends; both are the mean where nothing varies."""
        half = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.error if self.error else 0.0
        return self.mean - half, self.mean + half

    def detectable(self, seeds: int | None = None) -> float:
        """The mean that four of five studies would tell from 0 by their interval, of this spread
        and as many seeds or of another number: that of a pilot says how many a study wants."""
        number = len(self.by_seed) if seeds is None else seeds
        quantiles = stats.t.ppf([0.975, 0.8], self._freedom(number))
        return float(quantiles.sum()) * self._error(number)

    def _variances(self, seeds: int) -> tuple[float, float]:
        """Variance of the mean over so many seeds: what the seeds add, and all."""
        of_seeds = float(np.var(self.by_seed, ddof=1)) / seeds
        return of_seeds, of_seeds + self.example_variance

    def _error(self, seeds: int) -> float:
        _, spread = self._variances(seeds)
        return math.sqrt(spread) if spread > _LEAST_SPREAD**2 else 0.0

    def _freedom(self, seeds: int) -> float:
        of_seeds, spread = self._variances(seeds)
        # the variance of examples is known far better than that of seeds
        return (seeds - 1) * (spread / of_seeds) ** 2 if of_seeds else math.inf

    @property
    def p_difference(self) -> float:
        """Two-sided p of a mean of 0, the larger one of two.

        One is that of the interval. The other takes no shape of the spread for granted: the share
        of all signs of the seeds that give a mean as far from 0, which is 2 / 2^n at least of n
        seeds. It takes the examples for all there are, so alone it finds differences of any two
        models that no other examples would show.
        """
        return max(self._p_of_interval, self._p_of_signs)

    @property
    def _p_of_interval(self) -> float:
        if not self.error:
            return float(self.mean == 0)
        return 2 * float(stats.t.sf(abs(self.mean) / self.error, self.freedom))

    @property
    def _p_of_signs(self) -> float:
        values = np.array(self.by_seed)
        if len(values) <= _EXACT_SEEDS:
            signs = _all_signs(len(values))
        else:
            drawn = np.random.default_rng(0).choice((1.0, -1.0), (2**_EXACT_SEEDS, len(values)))
            signs = np.vstack([np.ones(len(values)), drawn])
        sums = np.abs(signs @ values)
        return float(np.mean(sums >= sums[0] * (1 - 1e-9)))

    def p_equivalence(self, margin: float) -> float:
        """p of a mean at least `margin` from 0, the larger one of two one-sided tests."""
        room = margin - abs(self.mean)
        if not self.error:
            return float(room <= 0)
        return float(stats.t.sf(room / self.error, self.freedom))


@cache
def _all_signs(seeds: int) -> Array:
    """Every choice of signs, [2^seeds, seeds], all positive first."""
    return np.array(list(itertools.product((1.0, -1.0), repeat=seeds)))


def estimate(tasks: Sequence[Sample]) -> Estimate | None:
    """The mean of numbers of several tasks with the same seeds; `None` with fewer than two."""
    by_seed = np.mean([task.values for task in tasks], axis=0) if tasks else np.zeros(0)
    if len(by_seed) < 2:
        return None
    examples = sum(map(_example_variance, tasks)) / len(tasks) ** 2
    return Estimate(tuple(by_seed.tolist()), examples)


def _example_variance(task: Sample) -> float:
    """Variance of the mean over seeds by the examples alone: without what a seed makes of them."""
    if task.drawn is None:
        return 0.0
    of_mean = float(np.var(task.drawn.mean(axis=0), ddof=1))
    of_one = float(np.mean(np.var(task.drawn, axis=1, ddof=1)))
    together = max(of_one - of_mean, 0.0) / (len(task.drawn) - 1)
    return max(of_mean - together, 0.0)


def improvement(
    ours: Sequence[Sample], theirs: Sequence[Sample], direction: Literal["maximize", "minimize"]
) -> float:
    """How often a run of ours is better than one of theirs, ties half, averaged over tasks
    (Agarwal et al., arXiv 2108.13264, section 4.3)."""
    sign = 1 if direction == "maximize" else -1
    found = []
    for mine, other in zip(ours, theirs, strict=True):
        gaps = sign * (mine.values[:, None] - other.values)
        found.append(float(np.mean((gaps > 0) + 0.5 * (gaps == 0))))
    return statistics.fmean(found)


def decimals(spread: float) -> int | None:
    """Places behind the point of a number that is known to a spread: two digits of the spread.

    `None` where there is no spread, or none that a double tells from rounding.
    """
    if not _LEAST_SPREAD < spread < math.inf:
        return None
    return max(0, 1 - math.floor(math.log10(spread)))


def of_all_tasks(scores: Sequence[Score], tasks: Iterable[str | None]) -> list[Score]:
    """The scores, or none where a task is missing: an average over the others is another number."""
    return list(scores) if {score.task for score in scores} >= set(tasks) else []


def whole_seeds(scores: Iterable[Score]) -> dict[int, list[Score]]:
    """The runs of each seed that counts.

    A seed counts where it has every combination of task and other levels that any seed has:
    otherwise its average would be one of something else.
    """
    by_seed: dict[int, dict[_Cell, Score]] = defaultdict(dict)
    for score in scores:
        by_seed[score.seed][_cell(score)] = score
    everything = {cell for cells in by_seed.values() for cell in cells}
    return {
        seed: list(cells.values())
        for seed, cells in sorted(by_seed.items())
        if cells.keys() == everything
    }


def seed_means(scores: Iterable[Score]) -> dict[int, float]:
    """The average of the runs of each of `whole_seeds`."""
    return {
        seed: statistics.fmean(score.value for score in runs)
        for seed, runs in whole_seeds(scores).items()
    }


def mean_over_seeds(scores: Iterable[Score]) -> Mean:
    """Mean and standard deviation of `seed_means`."""
    whole = list(seed_means(scores).values())
    return Mean(
        len(whole),
        statistics.fmean(whole) if whole else None,
        statistics.stdev(whole) if len(whole) > 1 else None,
    )


def paired_samples(
    ours: Iterable[Score],
    theirs: Iterable[Score],
    tasks: Sequence[str | None],
    *,
    match_others: bool = True,
) -> list[tuple[Sample, Sample]]:
    """Two conditions' scores of every task, with the seeds that count for both (`whole_seeds`).

    Args:
        ours: runs of one condition.
        theirs: runs of the other.
        tasks: which are compared.
        match_others: take only levels of the other axes that both have; without it, `theirs` stands
            outside the axes and has one run a pair.

    Returns:
        [tasks]; without seeds where a task or every seed is missing.
    """
    left, right = ([s for s in scores if s.task in tasks] for scores in (ours, theirs))
    if match_others:
        both = set(map(_cell, left)) & set(map(_cell, right))
        left, right = ([s for s in scores if _cell(s) in both] for scores in (left, right))
    mine, others = (whole_seeds(of_all_tasks(scores, tasks)) for scores in (left, right))
    seeds = sorted(mine.keys() & others.keys())
    return [
        (_sample([mine[s] for s in seeds], task), _sample([others[s] for s in seeds], task))
        for task in tasks
    ]


def sampled(scores: Iterable[Score], tasks: Sequence[str | None]) -> list[Sample]:
    """A condition's scores of every task, with the seeds that count."""
    scores = list(scores)
    return [sample for sample, _ in paired_samples(scores, scores, tasks)]


def least_p(seeds: int, differences: int) -> float:
    """The smallest p that so many seeds can give so many differences, all corrected together: of
    2^n choices of signs two are the rarest."""
    return min(1.0, differences * 2.0 ** (1 - seeds))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number by Holm's step-down procedure; `None`, one that is not
    known yet, stays and counts as the largest."""
    known = sorted((p, index) for index, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(values) - rank) * p))
        corrected[index] = largest
    return corrected


def _cell(score: Score) -> _Cell:
    return score.task, score.others


def _sample(by_seed: Sequence[Sequence[Score]], task: str | None) -> Sample:
    """Sample of a task: the average of each seed's runs on it."""
    cells = [
        sorted((s for s in runs if s.task == task), key=lambda s: s.others) for runs in by_seed
    ]
    values = np.array([statistics.fmean(score.value for score in cell) for cell in cells])
    drawn = [[score.drawn for score in cell if score.drawn is not None] for cell in cells]
    whole = cells and all(len(d) == len(c) for d, c in zip(drawn, cells, strict=True))
    return Sample(values, np.array([np.mean(d, axis=0) for d in drawn]) if whole else None)
