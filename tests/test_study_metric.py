"""The number that runs are compared by: found soon, read again when corrected, shown as known."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from study_files import MAPPINGS, WEIGHTS, ended, run, write_study

from fastkd.errors import UserError
from fastkd.reporting.console import Reporter
from fastkd.study import load_study
from fastkd.study.metric import is_missing, read_metric
from fastkd.study.plan import Plan
from fastkd.study.statistics import Mean, Sample, decimals, estimate
from fastkd.study.storage import Store, Work
from fastkd.study.tables import _interval

pytestmark = pytest.mark.usefixtures("undrawn")

RUNS = {f"mapping={m}/seed-{s}" for m in MAPPINGS for s in (0, 1)}
RIGHT = {"path": "after.score", "direction": "maximize"}


def counts(notes: Path) -> Counter[str]:
    return Counter(ended(notes))


def values(folder: Path) -> dict[str, float]:
    with (folder / "out" / "report" / "runs.csv").open() as file:
        return {
            f"{r['condition']}/seed-{r['seed']}": float(r["value"]) for r in csv.DictReader(file)
        }


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("wrong", ["after.scores", "score", "after.score.x", "after.label.x", "x"])
def test_a_path_that_is_not_there_stops_after_the_first_run(
    tmp_path: Path, notes: Path, wrong: str, workers: int
) -> None:
    path = write_study(tmp_path, metric={**RIGHT, "path": wrong})
    for _ in range(2):
        with pytest.raises(UserError, match=r"no number .*; it has after\.score; correct") as no:
            run(path, workers=workers)
        assert "\n" not in str(no.value)
        assert 1 <= sum(counts(notes).values()) <= workers
    run(write_study(tmp_path, metric=RIGHT))
    # nothing is trained twice
    assert counts(notes) == dict.fromkeys(RUNS, 1)
    assert values(tmp_path).keys() == RUNS


def test_keys_that_hold_dots_are_found(tmp_path: Path) -> None:
    after = {
        "pairs": {"sts.dev": 0.8},
        "class_f1": {"dev": {"U.S.": 0.7, "ok": 0.6}},
        "losses": {"attention/1-1..3": 0.5},
        # the longest that leads on
        "a": {"b.c": 1.0, "b": {"d": 2.0}},
        "a.b": {"c": 3.0},
    }
    (tmp_path / "summary.json").write_text(json.dumps({"after": after}))
    for path, value in {
        "after.pairs.sts.dev": 0.8,
        "after.class_f1.dev.U.S.": 0.7,
        "after.class_f1.dev.ok": 0.6,
        "after.losses.attention/1-1..3": 0.5,
        "after.a.b.c": 3.0,
        "after.a.b.d": 2.0,
    }.items():
        assert read_metric(tmp_path, path) == value and not is_missing(tmp_path, path)
    for wrong in ("after.pairs.sts", "after.class_f1.dev.U.S", "after.pairs.sts.dev.x", "after."):
        said = read_metric(tmp_path, wrong)
        assert isinstance(said, str) and "it has after.pairs.sts.dev, after.class_f1" in said
        assert is_missing(tmp_path, wrong)


def test_another_path_is_read_from_the_summaries_that_are_there(
    tmp_path: Path, notes: Path
) -> None:
    run(write_study(tmp_path, metric=RIGHT))
    first = values(tmp_path)
    for summary in (tmp_path / "out" / "runs").rglob("summary.json"):
        tree = json.loads(summary.read_text())
        summary.write_text(json.dumps({**tree, "other": {"number": 10 * tree["after"]["score"]}}))
    path = write_study(tmp_path, metric={**RIGHT, "path": "other.number"})
    run(path, report_only=True)
    assert values(tmp_path) == pytest.approx({name: 10 * v for name, v in first.items()})
    run(path)
    assert counts(notes) == dict.fromkeys(RUNS, 1)
    # and back
    run(write_study(tmp_path, metric=RIGHT))
    assert values(tmp_path) == first and counts(notes) == dict.fromkeys(RUNS, 1)


def test_runs_that_failed_by_the_path_are_read_again(tmp_path: Path, notes: Path) -> None:
    run(write_study(tmp_path, metric=RIGHT))
    # a path that some have: those without are failures of their own
    summary = next((tmp_path / "out" / "runs").rglob("seed-0/run/summary.json"))
    tree = json.loads(summary.read_text())
    summary.write_text(json.dumps({**tree, "other": 1.5}))
    with pytest.raises(UserError, match=r"3 of 4 runs failed, .* no number other; it has"):
        run(write_study(tmp_path, metric={**RIGHT, "path": "other"}))
    run(write_study(tmp_path, metric=RIGHT))
    assert values(tmp_path).keys() == RUNS and counts(notes) == dict.fromkeys(RUNS, 1)


def test_a_search_may_be_corrected_until_it_has_candidates(tmp_path: Path, notes: Path) -> None:
    options: dict[str, Any] = {"axes": None, "spaces": {"w": WEIGHTS}, "search": {"trials": 2}}
    wrong = write_study(tmp_path, metric={**RIGHT, "path": "after.scores"}, **options)
    with pytest.raises(UserError, match=r"no number after\.scores"):
        run(wrong)
    run(write_study(tmp_path, metric=RIGHT, **options))
    assert set(counts(notes).values()) == {1} and len(counts(notes)) == 6
    with pytest.raises(UserError, match="made by a study file whose metric was another"):
        run(write_study(tmp_path, metric={**RIGHT, "path": "after.other"}, **options))


def store_of(path: Path) -> Store:
    store = Store(Plan(load_study(path), path))
    store.add_work()
    return store


def take(store: Store) -> Work:
    work = store.take()
    assert work is not None
    return work


def candidate_of(store: Store) -> Work:
    """The next candidate, once what it is compared with is done."""
    work = take(store)
    while work.study is store.grid:
        store.score(work, work.runs[0], 0.0, 0.0)
        store.finish(work)
        work.claim.release()
        work = take(store)
    return work


def test_what_was_refused_for_its_data_stays_refused_under_another_path(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first condition fails, and is run on other data once the second one is there
    monkeypatch.setenv("FAKE_FAIL", "mapping=uniform")
    with pytest.raises(UserError, match="2 of 4 runs failed"):
        run(write_study(tmp_path, metric=RIGHT))
    monkeypatch.delenv("FAKE_FAIL")
    monkeypatch.setenv("FAKE_DATA", "1")
    with pytest.raises(UserError, match="2 of 4 runs failed"):
        run(write_study(tmp_path, metric=RIGHT), retry_failed=True)
    for summary in (tmp_path / "out" / "runs").rglob("summary.json"):
        tree = json.loads(summary.read_text())
        summary.write_text(json.dumps({**tree, "other": 1.5}))
    said = (
        r"2 of 4 runs failed, the first is mapping=uniform/seed-0: data \(dev\): not what mapping="
    )
    with pytest.raises(UserError, match=said):
        run(write_study(tmp_path, metric={**RIGHT, "path": "other"}))
    with pytest.raises(UserError, match=said):
        run(write_study(tmp_path, metric=RIGHT))
    store = Store(Plan(load_study(tmp_path / "study.yaml"), tmp_path / "study.yaml"))
    assert {r.run.key: r.state for r in store.records()} == {
        key: "failed" if "uniform" in key else "finished" for key in RUNS
    }


def test_a_run_whose_summary_is_gone_is_run_again_for_another_path(
    tmp_path: Path, notes: Path
) -> None:
    run(write_study(tmp_path, metric={**RIGHT, "path": "after.score"}))
    for summary in (tmp_path / "out" / "runs").rglob("summary.json"):
        tree = json.loads(summary.read_text())
        summary.write_text(json.dumps({**tree, "other": 1.5}))
    (tmp_path / "out" / "runs" / "mapping=last" / "seed-1" / "run" / "summary.json").unlink()
    path = write_study(tmp_path, metric={**RIGHT, "path": "other"})
    states = {r.run.key: (r.state, r.value) for r in store_of(path).records()}
    assert states.pop("mapping=last/seed-1") == ("waiting", None)
    assert set(states.values()) == {("finished", 1.5)}


PRUNED: dict[str, Any] = {
    "axes": None,
    "spaces": {"w": WEIGHTS},
    "search": {"trials": 3, "pruner": "median", "startup_trials": 1},
    "seeds": 2,
}
OLD, NEW = {**RIGHT, "heldout": "score"}, {**RIGHT, "heldout": "other"}


def test_held_out_values_of_another_metric_prune_nothing(tmp_path: Path) -> None:
    store = store_of(write_study(tmp_path, metric=OLD, **PRUNED))
    work = candidate_of(store)
    assert not store.report(work, work.runs[0], {1: 900.0, 2: 950.0})
    store.score(work, work.runs[0], 900.0, 1.0)
    work.claim.release()
    store = store_of(write_study(tmp_path, metric=NEW, **PRUNED))
    again = candidate_of(store)
    assert (again.name, again.condition.levels) == (work.name, work.condition.levels)
    assert not store.has_score(again, again.runs[0])
    store.report(again, again.runs[0], {1: 0.1, 2: 0.2})
    for one in again.runs:
        store.score(again, one, 0.2, 1.0)
    store.finish(again)
    again.claim.release()
    other = take(store)
    assert other.name != again.name
    # ahead of 0.1, and far behind 900
    assert not store.report(other, other.runs[0], {1: 0.5})
    assert store.counts()[1] == 2 + 3


def test_values_of_a_candidate_that_failed_are_not_kept_for_another_metric(tmp_path: Path) -> None:
    store = store_of(write_study(tmp_path, metric=OLD, **PRUNED))

    def fail() -> None:
        work = candidate_of(store)
        store.score(work, work.runs[0], 900.0, 1.0)
        store.fail(work, "out of memory")
        work.claim.release()

    fail()
    fail()
    # both wait to be tried again, and one fails again
    store.add_work(retry_failed=True)
    fail()
    found = store_of(write_study(tmp_path, metric=NEW, **PRUNED)).records()
    states = {(r.run.condition.name, r.state, r.value, r.message) for r in found[2:]}
    assert states == {
        ("trial-0000", "failed", None, "out of memory"),
        ("trial-0001", "waiting", None, ""),
    }


def test_a_metric_is_not_changed_under_a_run(tmp_path: Path) -> None:
    store = store_of(write_study(tmp_path, metric=RIGHT))
    work = take(store)
    path = write_study(tmp_path, metric={**RIGHT, "path": "after.other"})
    with pytest.raises(UserError, match=r"seed-0 is under way by the metric as it was; stop the"):
        store_of(path)
    work.claim.release()
    assert store_of(path).counts() == (0, 4)


def test_what_is_said_counts_the_run_that_it_is_about(tmp_path: Path, notes: Path) -> None:
    written = io.StringIO()
    reporter = Reporter()
    reporter.console = Console(file=written, width=200, highlight=False, soft_wrap=True)
    run(write_study(tmp_path), reporter=reporter)
    lines = [line for line in written.getvalue().splitlines() if "/4  mapping=" in line]
    assert [line.split("/")[0] for line in lines][-1] == "4"
    # two runs may end between two looks, but none is said before it is counted
    counts = [int(line.split("/")[0]) for line in lines]
    assert len(lines) == 4 and all(count > index for index, count in enumerate(counts))


@pytest.mark.parametrize(
    ("mean", "deviation", "expected"),
    [
        (0.0368, 0.0000213, "0.036800 ± 0.000021"),
        (0.8123, 0.0217, "0.812 ± 0.022"),
        (0.8123, 0.00096, "0.81230 ± 0.00096"),
        (0.5, 0.0, "0.5 ± 0"),
        (0.03681234, 0.0, "0.03681 ± 0"),
        (3.0, 2.6458, "3.0 ± 2.6"),
        (123456.0, 789.0, "123456 ± 789"),
        (-1.5, 0.1, "-1.50 ± 0.10"),
        (1e-9, 2e-10, "0.00000000100 ± 0.00000000020"),
        (0.1, 1e-17, "0.1 ± 0"),
    ],
)
def test_digits_follow_the_deviation(mean: float, deviation: float, expected: str) -> None:
    assert str(Mean(2, mean, deviation)) == expected


def test_digits_of_a_difference_follow_its_interval() -> None:
    found = estimate([Sample(1e-4 + 1e-6 * np.arange(3))])
    assert _interval(found) == "+0.0001010 [+0.0000985, +0.0001035]"
    assert _interval(found, share=True) == "0.01010% [0.00985, 0.01035]"
    assert _interval(estimate([Sample(np.full(2, 0.25))])) == "+0.25 [+0.25, +0.25]"
    assert _interval(None) == ""
    assert decimals(0.0) is None and decimals(float("inf")) is None and decimals(250.0) == 0
