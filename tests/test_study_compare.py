"""Statistics of a study against numbers worked out by hand and by SciPy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from fastkd.study.statistics import (
    Mean,
    Score,
    choose_test,
    compare,
    holm,
    mean_over_seeds,
    paired_values,
    seed_means,
)


def _scores(values: dict[tuple[str | None, int], float], other: str = "x") -> list[Score]:
    return [Score("level", (other,), task, seed, v) for (task, seed), v in values.items()]


def test_mean_and_deviation_by_hand() -> None:
    found = mean_over_seeds(_scores({(None, 0): 1.0, (None, 1): 2.0, (None, 2): 6.0}))
    # mean 3; squares 4 + 1 + 9 = 14, over n - 1 = 2
    assert found == Mean(3, 3.0, math.sqrt(7.0))
    assert str(found) == "3.0 ± 2.6"


def test_tasks_are_averaged_within_a_seed_first() -> None:
    values = {("a", 0): 1.0, ("b", 0): 3.0, ("a", 1): 5.0, ("b", 1): 7.0}
    found = mean_over_seeds(_scores(values))
    # seeds 2 and 6: the spread between tasks is not the spread between seeds
    assert found == Mean(2, 4.0, math.sqrt(8.0))


def test_one_seed_is_no_result() -> None:
    found = mean_over_seeds(_scores({(None, 4): 0.9}))
    assert (found.mean, found.deviation) == (None, None)
    assert str(found) == "1 seed"
    assert str(mean_over_seeds([])) == "0 seeds"


def test_a_seed_without_all_tasks_does_not_count() -> None:
    values = {("a", 0): 1.0, ("b", 0): 3.0, ("a", 1): 5.0, ("b", 1): 7.0, ("a", 2): 100.0}
    assert seed_means(_scores(values)) == {0: 2.0, 1: 6.0}
    only = mean_over_seeds(_scores({("a", 0): 1.0, ("b", 0): 3.0, ("a", 1): 5.0}))
    assert str(only) == "1 seed"


def test_pairs_are_of_the_same_task_and_seed() -> None:
    ours = _scores({("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 3.0})
    theirs = _scores({("a", 1): 20.0, ("b", 0): 30.0, ("b", 1): 40.0})
    assert paired_values(ours, theirs) == {("a", 1): (2.0, 20.0), ("b", 0): (3.0, 30.0)}


def test_other_axes_are_averaged_where_both_have_them() -> None:
    pair = (None, 0)
    ours = _scores({pair: 1.0}, "x") + _scores({pair: 3.0}, "y") + _scores({pair: 99.0}, "z")
    theirs = _scores({pair: 10.0}, "x") + _scores({pair: 30.0}, "y")
    assert paired_values(ours, theirs) == {pair: (2.0, 20.0)}
    # what stands outside the axes has no levels to match
    outside = [Score("none", (), None, 0, 5.0)]
    assert paired_values(ours, outside) == {}
    assert paired_values(ours, outside, match_others=False) == {pair: (103.0 / 3, 5.0)}


OURS = (0.81, 0.84, 0.80, 0.86, 0.79, 0.88, 0.83)
THEIRS = (0.78, 0.80, 0.81, 0.81, 0.77, 0.80, 0.82)


def _pairs(count: int, tasks: int = 1) -> dict[tuple[str | None, int], tuple[float, float]]:
    return {(str(i % tasks), i): (OURS[i], THEIRS[i]) for i in range(count)}


def test_difference_by_hand() -> None:
    found = compare({(None, 0): (3.0, 2.0), (None, 1): (5.0, 2.0), (None, 2): (7.0, 5.0)})
    # differences 1, 3, 2: mean 2, deviation 1, t = 2 sqrt(3) with 2 degrees of freedom, for which
    # the distribution is 1/2 + t / (2 sqrt(2 + t^2)) and its 97.5 % point is 4.302653
    assert found.mean == pytest.approx(2.0)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.t_p == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(14))
    # all three ranks positive: 2 of 2^3 assignments of signs
    assert found.wilcoxon_p == pytest.approx(0.25)
    assert (found.pairs, found.test, found.p) == (3, "paired t-test", found.t_p)


def test_difference_equals_scipys_paired_tests() -> None:
    found = compare(_pairs(7))
    t = stats.ttest_rel(OURS, THEIRS)
    assert found.t_p == pytest.approx(t.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(t.confidence_interval(0.95)))
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(OURS, THEIRS).pvalue)
    # and not those of samples that are not paired
    assert found.t_p != pytest.approx(stats.ttest_ind(OURS, THEIRS).pvalue, rel=0.2)


def test_the_other_way_round_is_the_same_with_the_other_sign() -> None:
    there = compare(_pairs(7))
    back = compare({pair: (b, a) for pair, (a, b) in _pairs(7).items()})
    assert back.mean == pytest.approx(-there.mean)  # type: ignore[operator]
    assert (back.t_p, back.wilcoxon_p) == pytest.approx((there.t_p, there.wilcoxon_p))


def test_the_design_chooses_the_test() -> None:
    assert choose_test(tasks=1, pairs=50, comparisons=1) == "paired t-test"
    # 2 / 2^6 = 0.031 could pass alone, three times that could not
    assert choose_test(tasks=2, pairs=6, comparisons=1) == "Wilcoxon signed-rank"
    assert choose_test(tasks=2, pairs=6, comparisons=3) == "paired t-test"
    assert choose_test(tasks=2, pairs=5, comparisons=1) == "paired t-test"
    assert choose_test(tasks=5, pairs=15, comparisons=8) == "Wilcoxon signed-rank"
    found = compare(_pairs(7, tasks=2))
    assert found.p == found.wilcoxon_p != found.t_p


def test_smallest_wilcoxon_p_is_what_the_choice_assumes() -> None:
    for pairs in (3, 6, 9):
        found = compare({(None, i): (1.0 + 0.1 * i, 0.0) for i in range(pairs)})
        assert found.wilcoxon_p == pytest.approx(2.0 ** (1 - pairs))


@pytest.mark.parametrize(("step", "p"), [(0.0, 1.0), (0.25, None)])
def test_differences_without_spread_are_not_tested(step: float, p: float | None) -> None:
    found = compare({(None, i): (i + step, float(i)) for i in range(3)})
    assert (found.mean, found.t_p, found.wilcoxon_p) == (step, p, p)


def test_one_pair_is_not_a_difference() -> None:
    found = compare({(None, 0): (1.0, 2.0)})
    assert (found.pairs, found.mean, found.p) == (1, None, None)


def test_holm_by_hand() -> None:
    # sorted .005 .01 .03 .04, times 4 3 2 1, never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # what is not tested is not counted
    assert holm([0.02, None, 0.5]) == [0.04, None, 0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
