"""Statistics of a study against numbers worked out by hand and by SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fastkd.data.tasks.retention import Number
from fastkd.study.statistics import (
    Estimate,
    Mean,
    Sample,
    Score,
    estimate,
    holm,
    improvement,
    mean_over_seeds,
    paired_samples,
    sampled,
    seed_means,
)

Values = dict[tuple[str | None, int], float]


def _scores(values: Values, other: str = "x") -> list[Score]:
    return [Score("level", (other,), task, seed, v) for (task, seed), v in values.items()]


def test_mean_and_deviation_by_hand() -> None:
    found = mean_over_seeds(_scores({(None, 0): 1.0, (None, 1): 2.0, (None, 2): 6.0}))
    # mean 3; squares 4 + 1 + 9 = 14, over n - 1 = 2
    assert found == Mean(3, 3.0, math.sqrt(7.0))
    assert str(found) == "3.0 ± 2.6"


def test_tasks_are_averaged_within_a_seed_first() -> None:
    values: Values = {("a", 0): 1.0, ("b", 0): 3.0, ("a", 1): 5.0, ("b", 1): 7.0}
    found = mean_over_seeds(_scores(values))
    # seeds 2 and 6: the spread between tasks is not the spread between seeds
    assert found == Mean(2, 4.0, math.sqrt(8.0))


def test_one_seed_has_a_value_and_no_deviation() -> None:
    found = mean_over_seeds(_scores({(None, 4): 0.9}))
    assert found == Mean(1, 0.9, None)
    assert str(found) == "0.9 (1 seed)"
    assert str(mean_over_seeds([])) == "0 seeds"


def test_a_seed_without_all_tasks_does_not_count() -> None:
    values: Values = {("a", 0): 1.0, ("b", 0): 3.0, ("a", 1): 5.0, ("b", 1): 7.0, ("a", 2): 100.0}
    assert seed_means(_scores(values)) == {0: 2.0, 1: 6.0}
    only = mean_over_seeds(_scores({("a", 0): 1.0, ("b", 0): 3.0, ("a", 1): 5.0}))
    assert str(only) == "2 (1 seed)"


def test_pairs_are_of_seeds_that_both_have_on_every_task() -> None:
    ours = _scores({("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 3.0, ("b", 1): 4.0, ("b", 2): 5.0})
    theirs = _scores({("a", 1): 20.0, ("b", 0): 30.0, ("b", 1): 40.0, ("b", 2): 50.0})
    assert _values(ours, theirs, "ab") == [([2.0], [20.0]), ([4.0], [40.0])]
    assert _values(ours, theirs, "b") == [([3.0, 4.0, 5.0], [30.0, 40.0, 50.0])]
    assert [one.values.tolist() for one in sampled(ours, "ab")] == [[1.0, 2.0], [3.0, 4.0]]


def test_other_axes_are_averaged_where_both_have_them() -> None:
    pair = ("a", 0)
    ours = _scores({pair: 1.0}, "x") + _scores({pair: 3.0}, "y") + _scores({pair: 99.0}, "z")
    theirs = _scores({pair: 10.0}, "x") + _scores({pair: 30.0}, "y")
    assert _values(ours, theirs, "a") == [([2.0], [20.0])]
    # what stands outside the axes has no levels to match
    outside = [Score("none", (), "a", 0, 5.0)]
    assert _values(ours, outside, "a") == [([], [])]
    (found,) = paired_samples(ours, outside, "a", match_others=False)
    assert [one.values.tolist() for one in found] == [[pytest.approx(103.0 / 3)], [5.0]]


def test_a_seed_without_all_combinations_is_in_no_pair_and_no_share() -> None:
    x, y = (
        _scores({("a", s): v + s for s in range(n)}, o) for o, v, n in (("x", 1, 3), ("y", 9, 2))
    )
    # of the third seed only the smaller half is made
    assert mean_over_seeds(x + y) == Mean(2, 5.5, math.sqrt(0.5))
    assert [one.values.tolist() for one in sampled(x + y, "a")] == [[5.0, 6.0]]
    outside = [Score("none", (), "a", seed, 5.0) for seed in range(3)]
    (pair,) = paired_samples(x + y, outside, "a", match_others=False)
    assert [one.values.tolist() for one in pair] == [[5.0, 6.0], [5.0, 5.0]]
    whole = _scores({("a", s): 0.0 for s in range(3)}, "y")
    assert _values(x + y, x + whole, "a") == [([5.0, 6.0], [0.5, 1.0])]


def _values(
    ours: list[Score], theirs: list[Score], tasks: str
) -> list[tuple[list[float], list[float]]]:
    pairs = paired_samples(ours, theirs, tasks)
    return [(one.values.tolist(), other.values.tolist()) for one, other in pairs]


OURS = np.array((0.81, 0.84, 0.80, 0.86, 0.79, 0.88, 0.83))
THEIRS = np.array((0.78, 0.80, 0.81, 0.81, 0.77, 0.80, 0.82))


def test_without_predictions_an_interval_is_that_of_the_paired_t_test() -> None:
    found = estimate([Sample(OURS) - Sample(THEIRS)])
    assert found is not None
    t = stats.ttest_rel(OURS, THEIRS)
    assert found.mean == pytest.approx((OURS - THEIRS).mean())
    assert found.interval() == pytest.approx(tuple(t.confidence_interval(0.95)))
    assert (found.freedom, found.by_seed) == (6, tuple(OURS - THEIRS))
    # as large is the sum of all gains, and with one of the two smallest as a loss
    assert t.pvalue < 2 * 3 / 2**7 == found.p_difference


def test_the_unit_is_a_seed_over_all_tasks() -> None:
    # what a seed does to one task it does to the other: no more is known than of one
    one, both = estimate([Sample(OURS)]), estimate([Sample(OURS), Sample(OURS)])
    assert one == both
    apart = estimate([Sample(OURS), Sample(THEIRS)])
    assert apart is not None and one is not None
    assert apart.error == pytest.approx(stats.sem((OURS + THEIRS) / 2))


def test_examples_add_what_seeds_do_not_show() -> None:
    rng = np.random.default_rng(0)
    common, own = rng.normal(0, 0.3, 4000), rng.normal(0, 0.05, (5, 4000))
    seeds = np.array([-0.2, 0.1, 0.0, 0.05, 0.05])
    of_seeds = stats.sem(seeds)
    # examples alone: their variance is added, and is known well
    found = estimate([Sample(seeds, seeds[:, None] + common)])
    assert found is not None
    assert found.error == pytest.approx(math.hypot(of_seeds, common.std(ddof=1)))
    share = of_seeds**2 / found.error**2
    assert found.freedom == pytest.approx(4 / share**2)
    # what each seed makes of the examples is in the spread between seeds already
    apart = estimate([Sample(seeds, seeds[:, None] + common + own)])
    assert apart is not None and apart.error == pytest.approx(found.error, rel=0.01)
    # two tasks have examples of their own
    two = estimate([Sample(seeds, seeds[:, None] + common)] * 2)
    assert two is not None
    assert two.error == pytest.approx(math.hypot(of_seeds, common.std(ddof=1) / math.sqrt(2)))


def test_differences_of_draws_are_made_draw_by_draw() -> None:
    one = Sample(np.array([1.0, 2.0]), np.array([[1.0, 3.0], [2.0, 6.0]]))
    gap = one - Sample(np.array([4.0, 4.0]), np.array([[2.0, 4.0], [2.0, 4.0]]))
    assert gap.values.tolist() == [-3.0, -2.0]
    assert gap.drawn is not None and gap.drawn.tolist() == [[-1.0, -1.0], [0.0, 2.0]]
    assert (one - Sample(np.array([4.0, 4.0]))).drawn is None


def test_a_share_of_draws_is_the_ratio_to_first_order() -> None:
    rng = np.random.default_rng(0)
    middle, off = np.array([0.7, 0.5, 0.8]), 1e-4 * rng.normal(size=(3, 100))
    student, floor, teacher = (Number(m, m + o) for m, o in zip(middle, off, strict=True))
    share = student.between(floor, teacher)
    assert share.value == pytest.approx(2 / 3)
    drawn = middle[:, None] + off
    ratio = (drawn[0] - drawn[1]) / (drawn[2] - drawn[1])
    assert share.drawn == pytest.approx(ratio, abs=1e-6) and np.std(ratio) > 1e-4
    assert student.between(floor, Number(0.8)) == Number(share.value)


def test_signs_are_flipped_with_the_seed_as_the_unit() -> None:
    # all alike: 2 of 2^n, however large the differences are
    for seeds in (3, 6, 9):
        found = estimate([Sample(1.0 + 1e-3 * np.arange(seeds))])
        assert found is not None and found.p_difference == 2.0 ** (1 - seeds)
    many = estimate([Sample(1.0 + 1e-3 * np.arange(20))])
    assert many is not None and 0 < many.p_difference < 1e-4
    # 17 signs are drawn: 11 or more of 17 alike, of 2^17, both ways
    drawn = estimate([Sample(np.array([1.0] * 11 + [-1.0] * 6))])
    assert drawn is not None
    exact = 2 * sum(math.comb(17, n) for n in range(11, 18)) / 2**17
    assert drawn._p_of_signs == pytest.approx(exact, rel=0.03)


def test_equivalence_is_two_one_sided_tests() -> None:
    found = estimate([Sample(OURS - THEIRS)])
    assert found is not None
    low = stats.ttest_1samp(OURS - THEIRS, -0.05, alternative="greater").pvalue
    high = stats.ttest_1samp(OURS - THEIRS, 0.05, alternative="less").pvalue
    assert found.p_equivalence(0.05) == pytest.approx(max(low, high))
    # the 90 % interval lies inside the margin exactly where p is below 0.05
    edge = max(map(abs, found.interval(0.9)))
    assert found.p_equivalence(edge * 1.01) < 0.05 < found.p_equivalence(edge * 0.99)


@pytest.mark.parametrize(("step", "p"), [(0.0, 1.0), (0.25, 0.25)])
def test_differences_without_spread(step: float, p: float) -> None:
    found = estimate([Sample(np.full(3, step))])
    assert found is not None and found.interval() == (step, step)
    assert (found.error, found.p_difference) == (0.0, p)
    assert (found.p_equivalence(0.3), found.p_equivalence(0.2)) == (0.0, float(step > 0))


def test_one_seed_is_not_a_difference() -> None:
    assert estimate([Sample(np.array([1.0]))]) is None
    assert estimate([Sample(np.zeros(0))]) is None and estimate([]) is None


def test_what_is_detectable_is_found_four_times_in_five() -> None:
    rng, seeds, spread = np.random.default_rng(0), 10, 0.02
    drawn = rng.normal(0, spread, (4000, seeds))
    pilot = [estimate([Sample(values)]) for values in drawn[:500]]
    wanted = float(np.median([found.detectable() for found in pilot if found is not None]))
    seen = 0
    for values in drawn:
        found = estimate([Sample(values + wanted)])
        assert found is not None
        seen += found.interval()[0] > 0
    assert 0.75 < seen / len(drawn) < 0.85


def test_a_pilot_says_what_more_seeds_would_see() -> None:
    rng, spread, examples = np.random.default_rng(0), 0.02, 0.003**2
    pilot = Estimate(tuple(rng.normal(0, spread, 200).tolist()), examples)
    wanted = pilot.detectable(5)
    # five seeds, and an error that the examples give to all of them
    seen = 0
    for values in rng.normal(wanted, spread, (4000, 5)):
        found = Estimate(tuple((values + rng.normal(0, 0.003)).tolist()), examples)
        seen += found.interval()[0] > 0
    assert 0.75 < seen / 4000 < 0.85
    assert pilot.detectable() == pilot.detectable(200) < wanted
    # no number of seeds says what the examples don't
    floor = stats.norm.ppf([0.975, 0.8]).sum() * math.sqrt(examples)
    assert pilot.detectable(10**9) == pytest.approx(floor, rel=1e-3)


def test_wins_are_counted_over_all_pairs_of_runs() -> None:
    one, other = Sample(np.array([1.0, 3.0])), Sample(np.array([2.0, 3.0]))
    # 1 loses twice, 3 wins once and ties once
    assert improvement([one], [other], "maximize") == 1.5 / 4
    assert improvement([one], [other], "minimize") == 2.5 / 4
    assert improvement([one, one], [other, Sample(np.zeros(2))], "maximize") == (1.5 / 4 + 1) / 2


def test_holm_by_hand() -> None:
    # sorted .005 .01 .03 .04, times 4 3 2 1, never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # what is not known yet may come to anything
    assert holm([0.02, None, 0.4]) == pytest.approx([0.06, None, 0.8])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
