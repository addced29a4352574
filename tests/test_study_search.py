"""A search: what is drawn, what is pruned, what turns out to matter."""

from __future__ import annotations

import csv
import itertools
import math
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from study_files import MAPPINGS, RECIPE, TASKS, WEIGHTS, ended, journal, run, write_study

from fastkd.errors import UserError
from fastkd.study import load_study, opening, search, worker
from fastkd.study.locks import Claim
from fastkd.study.plan import Plan
from fastkd.study.search import importances, make_sampler
from fastkd.study.storage import Store

pytestmark = pytest.mark.usefixtures("undrawn")


def _search(folder: Path, **changes: Any) -> Path:
    options = {"axes": None, "spaces": {"weight": WEIGHTS}, "search": {"trials": 3}, **changes}
    return write_study(folder, **options)


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "out" / "report" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def _optuna(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="tried", storage=f"sqlite:///{folder}/out/study.db")


@pytest.mark.parametrize(
    ("sampler", "drawn"), [("random", 1), ("random", 2), ("tpe", 2), ("cmaes", 1)]
)
def test_a_candidate_whose_draw_was_stopped_is_the_one_that_it_would_have_been(
    sampler: str, drawn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces = {name: WEIGHTS | {"field": f"losses.{name}.weight"} for name in ("hidden", "logits")}
    options = {"search": {"sampler": sampler, "trials": 3, "seed": 7}, "spaces": spaces}
    axes = None if sampler == "cmaes" else {"mapping": MAPPINGS}

    def taken(folder: Path, *, stopped_early: bool = False) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        path = _search(folder, axes=axes, **options)
        store = Store(Plan(load_study(path), path))
        if stopped_early:
            draw_one, calls = search._draw, itertools.count()

            def stopped(*given: Any) -> Any:
                if next(calls) == drawn - len(axes or ()):
                    # as the end of the process would
                    assert claims[-1] is not None
                    claims[-1].release()
                    raise KeyboardInterrupt
                return draw_one(*given)

            monkeypatch.setattr(search, "_draw", stopped)
            take, claims = Claim.take, list[Claim | None]()

            def noted(path: Path) -> Claim | None:
                claims.append(claim := take(path))
                return claim

            monkeypatch.setattr(Claim, "take", noted)
        work = store.take()
        assert work is not None
        return work.trial.params

    whole = taken(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        taken(tmp_path / "cut", stopped_early=True)
    monkeypatch.undo()
    assert len(_optuna(tmp_path / "cut").trials[0].params) == drawn
    assert taken(tmp_path / "cut") == whole and len(whole) > drawn


@pytest.mark.usefixtures("notes")
def test_a_study_is_made_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(path: Path) -> None:
        # as a kill between two of Optuna's tables
        sqlite3.connect(path).execute("create table studies (name)").connection.close()
        raise KeyboardInterrupt

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(opening, "_storage", stopped)
        run(write_study(tmp_path))
    (left,) = (path for path in (tmp_path / "out").iterdir() if path.name != "study.lock")
    assert left.name.startswith(".study.db.")
    run(tmp_path / "study.yaml")
    assert not left.exists()
    assert [row["state"] for row in _rows(tmp_path, "runs")] == ["finished"] * 4


def test_candidates_run_on_every_task_and_seed_and_score_their_mean(
    tmp_path: Path, notes: Path
) -> None:
    run(_search(tmp_path, tasks=TASKS), workers=2)
    ends = ended(notes)
    names = ["baseline", *(f"trial-{n:04d}" for n in range(3))]
    assert sorted(ends) == sorted(
        f"{task}/{name}/seed-{seed}" for task in TASKS for name in names for seed in (0, 1)
    )
    rows = _rows(tmp_path, "runs")
    trials = _optuna(tmp_path).trials
    assert len({trial.params["weight"] for trial in trials}) == 3
    for number, trial in enumerate(trials):
        mine = [row for row in rows if row["condition"] == f"trial-{number:04d}"]
        assert {float(row["weight"]) for row in mine} == {trial.params["weight"]}
        assert trial.value == pytest.approx(sum(float(row["value"]) for row in mine) / 4)
        assert 0.1 <= trial.params["weight"] <= 100
    best = _rows(tmp_path, "conditions")[1]
    assert float(best["all mean"]) == pytest.approx(max(trial.value or 0 for trial in trials))
    assert best["difference seeds"] == "2"
    # more candidates may be asked for later; those that are there stay
    run(_search(tmp_path, tasks=TASKS, search={"trials": 4}))
    assert [t.params for t in _optuna(tmp_path).trials[:3]] == [t.params for t in trials]
    assert len(_optuna(tmp_path).trials) == 4


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seeds": 3}, "seeds"),
        ({"overrides": {"train.steps": 6}}, "overrides"),
        ({"search": {"trials": 3, "seed": 1}}, "search"),
        ({"spaces": {"weight": {**WEIGHTS, "high": 10.0}}}, "spaces"),
        # held-out values, choices and numbers of candidates are of things in an order
        ({"tasks": dict(reversed(TASKS.items()))}, "tasks"),
        ({"axes": {"mapping": dict(reversed(MAPPINGS.items()))}}, "axes"),
    ],
)
def test_a_search_whose_scores_would_mean_something_else_is_refused(
    changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    same: dict[str, Any] = {"tasks": TASKS, "axes": {"mapping": MAPPINGS}}
    path = _search(tmp_path, **same)
    Store(Plan(load_study(path), path))
    path = _search(tmp_path, **{**same, **changes})
    changed = Plan(load_study(path), path)
    with pytest.raises(UserError, match=f"made by a study file whose {key} was another"):
        Store(changed)


@pytest.mark.parametrize("stages", [None, [{"train": {"steps": 3}}, {"train": {"steps": 5}}]])
def test_hopeless_candidates_are_pruned(
    stages: Any, tmp_path: Path, notes: Path, monkeypatch: Any
) -> None:
    # every step is seen
    monkeypatch.setattr(worker, "_POLL_SECONDS", 0.02)
    monkeypatch.setenv("FAKE_STEP", "0.1")
    # good ones first, and then two that are behind from the first step on
    spaces = {"weight": {"field": "losses.hidden.weight", "values": [10, 9, 8, 0.1, 0.11]}}
    search = {"sampler": "grid", "pruner": "median", "startup_trials": 2}
    recipe = {**RECIPE, "stages": stages} if stages else RECIPE
    run(_search(tmp_path, spaces=spaces, search=search, recipe=recipe))
    states = [trial.state.name for trial in _optuna(tmp_path).trials]
    assert states[:2] == ["COMPLETE"] * 2 and states[3:] == ["PRUNED"] * 2
    words = {name: word for word, name in journal(notes)}
    assert words["trial-0003/seed-0"].startswith("stop@")
    assert "trial-0003/seed-1" not in words
    rows = [row for row in _rows(tmp_path, "runs") if row["condition"] == "trial-0003"]
    assert [row["state"] for row in rows] == ["pruned", "pruned"]
    # one that was stopped early is not among the best, whatever it had reached
    found = [row["condition"] for row in _rows(tmp_path, "conditions")]
    assert "trial-0003" not in found and "trial-0000" in found


def test_pruning_compares_the_same_step_of_the_same_run(tmp_path: Path) -> None:
    search = {"trials": 4, "pruner": "median", "startup_trials": 1}
    path = _search(tmp_path, tasks=TASKS, search=search)
    plan = Plan(load_study(path), path)
    store = Store(plan)
    assert store.search is not None

    def work(reports: list[dict[int, float]], finish: bool = True) -> list[bool]:
        taken = store.take()
        assert taken is not None
        # what a search is compared with comes first
        while taken.study is store.grid:
            store.score(taken, taken.runs[0], 0.0, 0.0)
            store.finish(taken)
            taken.claim.release()
            taken = store.take()
            assert taken is not None
        pruned = [
            store.report(taken, one, values)
            for one, values in zip(taken.runs, reports, strict=False)
        ]
        if finish:
            for one in taken.runs:
                store.score(taken, one, 0.5, 0.0)
            store.finish(taken)
            taken.claim.release()
        return pruned

    store.add_work()
    # two seeds of an easy task around 0.9, two of a hard one around 0.5
    assert work([{1: 0.9, 2: 0.91}, {1: 0.9}, {1: 0.5}, {1: 0.5}]) == [False] * 4
    # worse on the hard task alone: 0.9 on the easy one does not save it
    assert work([{1: 0.9, 2: 0.91}, {1: 0.9}, {1: 0.4}, {1: 0.6}]) == [False, False, True, False]
    # ahead at an earlier step is ahead: its best counts against the others' at this step
    assert work([{1: 0.95, 2: 0.8}]) == [False]
    # and the step matters: 0.9 was good at step 1, and is not at step 2
    assert work([{2: 0.9}], finish=False) == [True]


def test_runs_are_counted_also_inside_a_candidate(tmp_path: Path) -> None:
    path = _search(tmp_path, tasks=TASKS)
    store = Store(Plan(load_study(path), path))
    store.add_work()
    # what it is compared with and three candidates, each on two tasks with two seeds
    assert store.run_counts() == (0, 16) and store.counts() == (0, 7)
    done = 0
    for trial in range(5):
        work = store.take()
        assert work is not None and (work.study is store.search) == (trial == 4)
        for one in work.runs[:3]:
            store.score(work, one, 0.5, 1.0)
            done += 1
        assert store.run_counts() == (done, 16)
        if trial < 4:
            store.finish(work)
        work.claim.release()
    store.fail(work, "out of memory")
    assert store.run_counts() == (8, 16) and store.counts() == (5, 7)


def test_grid_sampler_tries_every_combination_once(tmp_path: Path, notes: Path) -> None:
    axes = {"mapping": {"uniform": {"layer_map": "uniform"}, "last": {"layer_map": "last"}}}
    spaces = {"weight": {**WEIGHTS, "points": 2}}
    run(_search(tmp_path, axes=axes, spaces=spaces, search={"sampler": "grid"}), workers=2)
    found = [(t.params["mapping"], t.params["weight"]) for t in _optuna(tmp_path).trials]
    assert found == [("uniform", 0.1), ("uniform", 100), ("last", 0.1), ("last", 100)]


def test_a_grid_that_was_stopped_while_it_was_queued_is_queued_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    spaces = {"weight": {"field": "losses.hidden.weight", "values": values}}
    path = _search(tmp_path, spaces=spaces, search={"sampler": "grid"})
    store = Store(Plan(load_study(path), path))
    queue, queued = optuna.Study.enqueue_trial, []

    def stopped(study: optuna.Study, *arguments: Any, **options: Any) -> None:
        if len(queued) == 2:
            raise KeyboardInterrupt
        queued.append(queue(study, *arguments, **options))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "enqueue_trial", stopped)
        store.add_work()
    for _ in range(2):
        store.add_work()
        trials = _optuna(tmp_path).trials
        assert [t.system_attrs["fixed_params"]["weight"] for t in trials] == values
        assert [t.user_attrs["name"] for t in trials] == [f"trial-{n:04d}" for n in range(5)]


def test_a_failed_candidate_is_tried_again_with_its_own_values(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "trial-0001/seed-1")
    with pytest.raises(UserError, match="trial-0001/seed-1: data"):
        run(_search(tmp_path))
    monkeypatch.delenv("FAKE_FAIL")
    run(_search(tmp_path), retry_failed=True)
    trials = _optuna(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[3].params == trials[1].params
    ends = ended(notes)
    assert sorted(set(ends)) == sorted(ends)
    assert len(_rows(tmp_path, "conditions")) == 4


def test_values_that_do_not_go_together_fail_alone(tmp_path: Path, notes: Path) -> None:
    spaces = {
        "steps": {"field": "train.steps", "values": [5, 3]},
        "warmup": {"field": "train.warmup_steps", "values": [0, 4]},
    }
    path = _search(tmp_path, spaces=spaces, search={"sampler": "grid"})
    with pytest.raises(UserError, match=r"train\.warmup_steps is 4, expected fewer than"):
        run(path)
    assert [t.state.name for t in _optuna(tmp_path).trials] == [*["COMPLETE"] * 3, "FAIL"]


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_two_processes_never_draw_the_same_candidate(sampler: str, tmp_path: Path) -> None:
    spaces = {"a": WEIGHTS, "b": {**WEIGHTS, "field": "train.learning_rate"}}
    path = _search(tmp_path, spaces=spaces, search={"sampler": sampler, "trials": 8})
    plan = Plan(load_study(path), path)
    drawn = []
    for _ in range(3):
        # a process that comes later opens the same file
        store = Store(plan)
        store.add_work()
        held = []
        while (work := store.take()) is not None and len(held) < 4:
            held.append(work)
            if work.study is store.search:
                drawn.append(tuple(work.condition.levels.values()))
        for work in held:
            for one in work.runs:
                store.score(work, one, math.log(float(drawn[-1][0])), 0.0)
            store.finish(work)
            work.claim.release()
    assert len(drawn) > 4 and len(set(drawn)) == len(drawn)


def test_a_search_for_what_is_low_is_one_for_its_sampler(tmp_path: Path) -> None:
    path = _search(tmp_path, metric={"path": "after.score", "direction": "minimize"})
    store = Store(Plan(load_study(path), path))
    assert store.search is not None and store.search.direction.name == "MINIMIZE"
    assert store.grid.direction.name == "MINIMIZE"


def test_sampler_learns(tmp_path: Path) -> None:
    spec = load_study(_search(tmp_path, search={"trials": 40})).search
    assert spec is not None
    study = optuna.create_study(direction="maximize")
    for number in range(40):
        study.sampler = make_sampler(spec, number)
        trial = study.ask()
        weight = trial.suggest_float("weight", 0.1, 100, log=True)
        study.tell(trial, -abs(math.log10(weight) - 1))
    late = [abs(math.log10(t.params["weight"]) - 1) for t in study.trials[20:]]
    early = [abs(math.log10(t.params["weight"]) - 1) for t in study.trials[:10]]
    assert sum(late) / 20 < 0.5 * sum(early) / 10


def test_importance_finds_what_matters() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), direction="maximize")
    for _ in range(9):
        _try(study)
    assert importances(study) == {}
    for _ in range(31):
        _try(study)
    found = importances(study)
    assert found.keys() == {"fANOVA", "PED-ANOVA"}
    for values in found.values():
        assert sum(values.values()) == pytest.approx(1)
        assert values["much"] > 0.7 > 0.3 > values["little"]


def _try(study: optuna.Study) -> None:
    trial = study.ask()
    much, little = trial.suggest_float("much", 0, 1), trial.suggest_float("little", 0, 1)
    study.tell(trial, 10 * much + 0.3 * little)


def test_taking_a_run_reads_the_storage_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path, seeds=5)
    store = Store(Plan(load_study(path), path))
    store.add_work()
    reads: list[int] = []
    read = RDBStorage._get_trials

    def counted(self: RDBStorage, *place: Any, **given: Any) -> Any:
        found = read(self, *place, **given)
        reads.append(len(found))
        return found

    monkeypatch.setattr(RDBStorage, "_get_trials", counted)
    taken = []
    for left in (10, 9, 8):
        work = store.take()
        assert work is not None and reads == [left]
        assert work.trial.datetime_start is not None
        taken.append(work.name)
        store.score(work, work.runs[0], 0.5, 1.0)
        store.finish(work)
        work.claim.release()
        reads.clear()
        assert not store.is_done() and len(reads) == 1
        reads.clear()
    assert taken == [run.key for run in store.plan.all_runs()][:3]
