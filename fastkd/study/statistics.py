"""How conditions compare: means over seeds, differences over pairs of the same task and seed.

What is paired: two conditions meet the same training data, initial weights and order of batches
where task and seed agree, so their difference there is free of those. A pair is one task with one
seed; levels of the other axes are averaged within it first, so that a full grid does not pass as
more independent evidence than it is.

Which test, fixed by the design and never by the outcome: the paired t-test on one task, where
differences are between seeds of the same kind; Wilcoxon's signed-rank test where there are several
tasks, whose differences have scales of their own (Demsar, JMLR 7, 2006, section 3.1), unless there
are so few pairs that it could never give a corrected p below 0.05. Both are always computed. Holm's
correction (Scandinavian Journal of Statistics 6, 1979) covers the comparisons of one table.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

Test = Literal["paired t-test", "Wilcoxon signed-rank"]
Pair = tuple[str | None, int]
"""A task and a seed."""

LEVEL = 0.05
"""What a p value should be able to fall below."""

# below this a spread is taken for rounding
_LEAST_SPREAD = 1e-15


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


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation over seeds."""

    seeds: int
    """Seeds for which every run is there."""
    mean: float | None
    """`None` with fewer than two seeds: one run is no result."""
    deviation: float | None
    """Of a sample, with n - 1."""

    def __str__(self) -> str:
        if self.mean is None or self.deviation is None:
            return f"{self.seeds} seed" + ("" if self.seeds == 1 else "s")
        places = decimals(self.deviation)
        if places is None:
            return f"{self.mean:.4g} ± 0"
        return f"{self.mean:.{places}f} ± {self.deviation:.{places}f}"


@dataclass(frozen=True)
class Difference:
    """How much more one condition scores than another, over pairs."""

    pairs: int
    mean: float | None
    low: float | None
    """Lower end of the 95 % interval of the mean by the t distribution."""
    high: float | None
    t_p: float | None
    """p of the paired t-test, two-sided."""
    wilcoxon_p: float | None
    """p of Wilcoxon's signed-rank test, two-sided."""
    test: Test
    """Which of the two counts."""

    @property
    def p(self) -> float | None:
        """p of the test that counts."""
        return self.t_p if self.test == "paired t-test" else self.wilcoxon_p


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


def seed_means(scores: Iterable[Score]) -> dict[int, float]:
    """The average of the runs of each seed.

    A seed counts where it has every combination of task and other levels that any seed has:
    otherwise its average would be one of something else.
    """
    by_seed: dict[int, dict[tuple[str | None, tuple[str, ...]], float]] = defaultdict(dict)
    for score in scores:
        by_seed[score.seed][score.task, score.others] = score.value
    everything = {cell for cells in by_seed.values() for cell in cells}
    return {
        seed: statistics.fmean(cells.values())
        for seed, cells in sorted(by_seed.items())
        if cells.keys() == everything
    }


def mean_over_seeds(scores: Iterable[Score]) -> Mean:
    """Mean and standard deviation of `seed_means`."""
    whole = list(seed_means(scores).values())
    if len(whole) < 2:
        return Mean(len(whole), None, None)
    return Mean(len(whole), statistics.fmean(whole), statistics.stdev(whole))


def paired_values(
    ours: Iterable[Score], theirs: Iterable[Score], *, match_others: bool = True
) -> dict[Pair, tuple[float, float]]:
    """The two conditions' values at every task and seed that both have.

    Args:
        ours: runs of one condition.
        theirs: runs of the other.
        match_others: take only levels of the other axes that both have; without it, `theirs` stands
            outside the axes and has one run a pair.
    """
    left, right = _by_pair(ours), _by_pair(theirs)
    found: dict[Pair, tuple[float, float]] = {}
    for pair in left.keys() & right.keys():
        mine, others = left[pair], right[pair]
        if match_others:
            both = mine.keys() & others.keys()
            mine = {key: mine[key] for key in both}
            others = {key: others[key] for key in both}
        if mine and others:
            found[pair] = statistics.fmean(mine.values()), statistics.fmean(others.values())
    # sorted, so that sums don't depend on the order of a set
    return dict(sorted(found.items(), key=lambda item: (item[0][0] or "", item[0][1])))


def choose_test(tasks: int, pairs: int, comparisons: int) -> Test:
    """The test that counts, by the design alone.

    Args:
        tasks: how many there are.
        pairs: how many differences are tested.
        comparisons: how many tests are corrected together.
    """
    # the smallest two-sided p of a signed-rank test is that of all signs alike
    smallest = 2.0 ** (1 - pairs) * comparisons
    return "Wilcoxon signed-rank" if tasks > 1 and smallest < LEVEL else "paired t-test"


def compare(values: Mapping[Pair, tuple[float, float]], comparisons: int = 1) -> Difference:
    """The difference between two conditions, tested over their pairs.

    Args:
        values: from `paired_values`.
        comparisons: how many differences are corrected together.
    """
    differences = [ours - theirs for ours, theirs in values.values()]
    count = len(differences)
    test = choose_test(len({task for task, _ in values}), count, comparisons)
    if count < 2:
        return Difference(count, None, None, None, None, None, test)
    mean = statistics.fmean(differences)
    largest = max(map(abs, differences))
    if max(differences) - min(differences) <= 1e-9 * largest:
        # no spread but rounding: the tests have nothing to say unless there is no difference at all
        p = 1.0 if mean == 0 else None
        return Difference(count, mean, mean, mean, p, p, test)
    error = statistics.stdev(differences) / math.sqrt(count)
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return Difference(
        count,
        mean,
        mean - half,
        mean + half,
        float(stats.ttest_1samp(differences, 0.0).pvalue),
        float(stats.wilcoxon(differences).pvalue),
        test,
    )


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number by Holm's step-down procedure; `None` stays."""
    known = sorted((p, index) for index, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def _by_pair(scores: Iterable[Score]) -> dict[Pair, dict[tuple[str, ...], float]]:
    found: dict[Pair, dict[tuple[str, ...], float]] = defaultdict(dict)
    for score in scores:
        found[score.task, score.seed][score.others] = score.value
    return found
