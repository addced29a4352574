"""Intervals and tests of a study hold what they say where the truth is known.

Runs are simulated as a study has them: two tasks, seeds that are paired, evaluation examples that
all runs share. Whether a run answers an example depends on how hard that is, on what the condition
makes of it, on the seed, and on what is left. What is true of all seeds and examples is known.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import norm

from fastkd.data.tasks.resampling import Array, draw_weights
from fastkd.data.tasks.retention import Number
from fastkd.study.statistics import Sample, estimate

TASKS, EXAMPLES, DRAWS, STUDIES = 2, 150, 150, 1500
WEIGHTS = [draw_weights(EXAMPLES, DRAWS, seed=task) / EXAMPLES for task in range(TASKS)]


class Spread(NamedTuple):
    """Standard deviations of what decides whether an example is answered."""

    hard: float = 1.0
    taste: float = 0.3
    """What a condition makes of an example."""
    seed: float = 0.1
    noise: float = 0.5

    def share_right(self, skill: float) -> float:
        """Of all examples and seeds."""
        return float(norm.cdf(skill / math.sqrt(sum(spread**2 for spread in self))))


STRUCTURES = {
    "a bit of each": Spread(),
    "seeds": Spread(taste=0.0, seed=0.3, noise=0.1),
    "examples": Spread(taste=0.8, seed=0.02, noise=0.1),
    "noise": Spread(taste=0.0, seed=0.0, noise=1.0),
}


def right(rng: np.random.Generator, spread: Spread, skill: float, hard: Array, seeds: int) -> Array:
    """Which examples a condition answers, [seeds, examples] of 0 and 1."""
    taste = rng.normal(0, spread.taste, EXAMPLES)
    seed = rng.normal(0, spread.seed, (seeds, 1))
    noise = rng.normal(0, spread.noise, (seeds, EXAMPLES))
    return (skill + hard + taste + seed + noise > 0).astype(float)


def conditions(
    rng: np.random.Generator, spread: Spread, skills: list[float], seeds: int
) -> list[list[Sample]]:
    """What conditions score on every task, [tasks][conditions]."""
    found = []
    for task in range(TASKS):
        hard = rng.normal(0, spread.hard, EXAMPLES)
        found.append([sample(right(rng, spread, s, hard, seeds), task) for s in skills])
    return found


def sample(answered: Array, task: int) -> Sample:
    return Sample(answered.mean(axis=1), answered @ WEIGHTS[task].T)


# what the page of studies says of few seeds
FEW = {2: 0.88, 3: 0.92}


@pytest.mark.parametrize(
    ("structure", "seeds"),
    [*((name, 10) for name in STRUCTURES), *(("a bit of each", seeds) for seeds in (2, 3, 5))],
)
def test_intervals_cover_a_difference_and_nothing_is_found_where_nothing_is(
    structure: str, seeds: int
) -> None:
    spread, rng = STRUCTURES[structure], np.random.default_rng([seeds, *structure.encode()])
    covered = alike = found = 0
    for _ in range(STUDIES):
        made = conditions(rng, spread, [0.5, 0.4, 0.4], seeds)
        gap = estimate([one - other for one, other, _ in made])
        none = estimate([one - other for _, one, other in made])
        assert gap is not None and none is not None
        low, high = gap.interval()
        covered += low <= spread.share_right(0.5) - spread.share_right(0.4) <= high
        low, high = none.interval()
        alike += low <= 0 <= high
        found += none.p_difference < 0.05
    said = FEW.get(seeds, 0.95)
    # three standard errors of so many simulated studies
    room = 3 * math.sqrt(said * (1 - said) / STUDIES) if seeds in FEW else 0.02
    assert [covered / STUDIES, alike / STUDIES] == pytest.approx([said, said], abs=room)
    assert found / STUDIES <= 0.06


def least_violation(one: Array, other: Array, rng: np.random.Generator) -> float:
    """The upper end, at 95 %, of how far `one` is from lying above `other` throughout, by almost
    stochastic order (del Barrio, Cuesta-Albertos and Matran, "The Mathematics of the Uncertain",
    2018; Dror, Shlomov and Reichart, ACL 2019, section 4)."""

    def violation(one: Array, other: Array) -> Array:
        # as many of each: quantiles are the sorted values
        gaps = np.sort(one) - np.sort(other)
        shares: Array = (np.minimum(gaps, 0) ** 2).sum(axis=-1) / (gaps**2).sum(axis=-1)
        return shares

    found, seeds = violation(one, other), len(one)
    drawn = violation(rng.choice(one, (300, seeds)), rng.choice(other, (300, seeds)))
    return float(found + norm.ppf(0.95) * np.std(drawn - found, ddof=1))


def test_almost_stochastic_order_finds_what_is_not_there() -> None:
    spread, rng = Spread(), np.random.default_rng(4)
    found = {0.2: 0, 0.5: 0}
    for _ in range(STUDIES):
        of_tasks = conditions(rng, spread, [0.4, 0.4], 10)
        one, other = (np.mean([made[i].values for made in of_tasks], axis=0) for i in (0, 1))
        least = min(least_violation(one, other, rng), least_violation(other, one, rng))
        found = {bound: count + (least < bound) for bound, count in found.items()}
    # what the page of studies says
    assert [100 * n / STUDIES for n in found.values()] == pytest.approx([16, 50], abs=2)


def test_intervals_cover_the_share_of_a_teacher_that_is_kept() -> None:
    spread, rng = Spread(), np.random.default_rng(2)
    # the teacher is one, and no draw of several
    truth = spread.share_right(0.8) - 0.5
    truth /= spread._replace(seed=0.0).share_right(1.0) - 0.5
    floor = Number(0.5, np.full(DRAWS, 0.5))
    covered = 0
    for _ in range(STUDIES):
        shares = []
        for task in range(TASKS):
            hard = rng.normal(0, spread.hard, EXAMPLES)
            made = sample(right(rng, spread, 0.8, hard, 10), task)
            taught = sample(right(rng, spread._replace(seed=0.0), 1.0, hard, 1), task)
            assert made.drawn is not None and taught.drawn is not None
            teacher = Number(taught.values[0], taught.drawn[0])
            kept = [
                Number(value, drawn).between(floor, teacher)
                for value, drawn in zip(made.values, made.drawn, strict=True)
            ]
            drawn = [number.drawn for number in kept if number.drawn is not None]
            shares.append(Sample(np.array([number.value for number in kept]), np.array(drawn)))
        found = estimate(shares)
        assert found is not None
        low, high = found.interval()
        covered += low <= truth <= high
    assert 0.93 <= covered / STUDIES <= 0.97


def test_margins_are_not_met_by_what_lies_on_them() -> None:
    spread, rng = Spread(), np.random.default_rng(3)
    margin = spread.share_right(0.5) - spread.share_right(0.4)
    met = 0
    for _ in range(STUDIES):
        made = conditions(rng, spread, [0.5, 0.4], 10)
        gap = estimate([one - other for one, other in made])
        assert gap is not None
        met += gap.p_equivalence(margin) < 0.05
    assert met / STUDIES <= 0.06
