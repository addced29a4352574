"""Running a study: once each, whatever happens in between; and its report."""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from study_files import MAPPINGS, RECIPE, TASKS, TUNING, ended, journal, run, write_study

from fastkd.errors import Interrupted, UserError
from fastkd.reporting import plotting
from fastkd.reporting.console import Reporter
from fastkd.study import report as study_report
from fastkd.study import worker
from fastkd.study.contents import other_content
from fastkd.study.locks import Claim
from fastkd.study.plan import Plan
from fastkd.study.progress import Watcher
from fastkd.study.spec import load_study
from fastkd.study.storage import Store

pytestmark = pytest.mark.usefixtures("undrawn")

RUNS = {f"mapping={m}/seed-{s}" for m in MAPPINGS for s in (0, 1)}


def _ended_once(notes: Path, names: set[str]) -> None:
    found = Counter(ended(notes))
    assert found == dict.fromkeys(names, 1)
    assert "TWICE" not in [word for word, _ in journal(notes)]


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "out" / "report" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def _wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_every_run_once_and_a_report(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_report, "png", plotting.png)
    monkeypatch.setattr(study_report, "inline_svg", plotting.inline_svg)
    path = write_study(
        tmp_path, controls={"alone": {"losses.hidden": None, "losses.embedding": {}}}
    )
    page = run(path)
    names = RUNS | {f"alone/seed-{s}" for s in (0, 1)}
    _ended_once(notes, names)
    rows = _rows(tmp_path, "runs")
    assert {row["state"] for row in rows} == {"finished"}
    assert len(rows) == 6
    for row in rows:
        summary = json.loads((Path(row["folder"]) / "run" / "summary.json").read_text())
        assert float(row["value"]) == summary["after"]["score"]
    alone, uniform, last = _rows(tmp_path, "axis-mapping")
    values = [float(row["value"]) for row in rows if row["mapping"] == "last"]
    assert float(last["all mean"]) == pytest.approx(sum(values) / 2)
    assert uniform["difference seeds"] == "" and last["difference seeds"] == "2"
    difference = float(last["all mean"]) - float(uniform["all mean"])
    assert float(last["difference mean"]) == pytest.approx(difference) and difference < 0
    assert float(alone["difference mean"]) < difference
    text = page.read_text()
    assert "<figure><div" in text and "src='http" not in text
    assert "axis-mapping.png" in (page.parent / "report.md").read_text()
    # again: nothing is run, the report is the same
    page.unlink()
    assert run(path).read_text() == text
    _ended_once(notes, names)
    assert run(path, report_only=True).read_text() == text


def test_a_failure_is_reported_kept_and_tried_again_when_asked(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path)
    monkeypatch.setenv("FAKE_FAIL", "mapping=last/seed-1")
    with pytest.raises(UserError) as caught:
        run(path)
    assert "1 of 4 runs failed, the first is mapping=last/seed-1: data.train: no such column; " in (
        str(caught.value)
    )
    bad = [row for row in _rows(tmp_path, "runs") if row["state"] == "failed"]
    assert [row["message"] for row in bad] == ["data.train: no such column"]
    last = _rows(tmp_path, "axis-mapping")[1]
    (only,) = (
        r["value"]
        for r in _rows(tmp_path, "runs")
        if r["condition"] == "mapping=last" and r["value"]
    )
    assert (last["runs"], last["planned"], last["all seeds"]) == ("1", "2", "1")
    assert (last["all mean"], last["all deviation"]) == (only, "")
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert f"last (1 of 2 runs) | {float(only):.4g} (1 seed) |" in report
    assert "| mapping=last/seed-1 | failed | data.train: no such column |" in report
    monkeypatch.delenv("FAKE_FAIL")
    with pytest.raises(UserError, match="1 of 4 runs failed"):
        run(path)
    run(path, retry_failed=True)
    _ended_once(notes, RUNS)
    assert {row["state"] for row in _rows(tmp_path, "runs")} == {"finished"}


@pytest.mark.parametrize("told", [True, False])
def test_a_full_disk_ends_the_study_and_fails_no_run(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Whether a run could say so, or its log is on that disk too."""
    path = write_study(tmp_path)
    monkeypatch.setenv("FAKE_FAIL", "mapping=last/seed-1")
    if told:
        monkeypatch.setenv("FAKE_MESSAGE", "a checkpoint: No space left on device")
    else:
        whole = worker.write_whole

        def full(path: Path, content: Any) -> None:
            if path.name == ".room":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            whole(path, content)

        monkeypatch.setattr(worker, "write_whole", full)
    with pytest.raises(UserError, match=r"No space left on device.*free some space and run the"):
        run(path)
    for name in ("FAKE_FAIL", "FAKE_MESSAGE"):
        monkeypatch.delenv(name, raising=False)
    run(path)
    assert {row["state"] for row in _rows(tmp_path, "runs")} == {"finished"}
    assert not [*(tmp_path / "out").rglob(".room")]


def test_a_run_on_other_data_than_the_others_of_its_task_has_no_score(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path)
    monkeypatch.setenv("FAKE_FAIL", "mapping=last/seed-1")
    with pytest.raises(UserError, match="1 of 4 runs failed"):
        run(path)
    monkeypatch.delenv("FAKE_FAIL")
    monkeypatch.setenv("FAKE_DATA", "1")
    said = r"mapping=last/seed-1: data \(dev\): not what mapping=uniform/seed-0 read: .* remove "
    with pytest.raises(UserError, match=said):
        run(path, retry_failed=True)
    monkeypatch.delenv("FAKE_DATA")
    shutil.rmtree(tmp_path / "out" / "runs" / "mapping=last" / "seed-1")
    run(path, retry_failed=True)
    assert {row["state"] for row in _rows(tmp_path, "runs")} == {"finished"}


@pytest.mark.parametrize("change", ["teacher", "none", "added"])
def test_a_model_of_the_same_name_with_other_files_is_told(
    tmp_path: Path, notes: Path, change: str
) -> None:
    path = write_study(tmp_path)
    run(path)
    plan = Plan(load_study(path), path)
    one, *_, other = plan.all_runs()
    noted = {"teacher.model": {"config.json": "0"}}
    for each in plan.all_runs():
        (plan.place(each).run / "models.json").write_text(json.dumps(noted))
    if change == "added":
        # of the hub more may have come since
        noted = {"teacher.model": {"config.json": "0", "added.json": "1"}}
    if change == "teacher":
        noted = {"teacher.model": {"config.json": "1"}}
    (plan.place(other).run / "models.json").write_text(json.dumps(noted))
    said = other_content(plan, other)
    if change != "teacher":
        assert said is None
    else:
        assert said is not None and said.startswith(
            f"teacher.model nothing: config.json is not what {one.key} read; put back"
        )


def test_a_child_that_crashes_or_says_nothing_of_the_metric(tmp_path: Path, notes: Path) -> None:
    crash = (sys.executable, "-c", "import os; print('hm', flush=True); os.kill(os.getpid(), 11)")
    with pytest.raises(UserError, match=r"ended by signal 11 \(SIGSEGV\); hm"):
        run(write_study(tmp_path), program=crash)
    # what an earlier attempt said is in the same log
    for words, said in (("raise SystemExit('fastkd: mend me')", "mend me"), ("0", "said nothing")):
        silent = (sys.executable, "-c", f"{words}; raise SystemExit(3)")
        with pytest.raises(UserError, match=said):
            run(tmp_path / "study.yaml", program=silent, retry_failed=True)
    for metric, said in (
        ("after.scores", "summary.json has no number after.scores; it has after.score"),
        ("after.label", 'after.label is "x", expected a finite number'),
    ):
        folder = tmp_path / metric
        folder.mkdir()
        path = write_study(folder, metric={"path": metric, "direction": "minimize"})
        with pytest.raises(UserError) as caught:
            run(path)
        assert said in str(caught.value)


def test_ctrl_c_stops_cleanly_and_the_next_call_continues(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path)
    monkeypatch.setenv("FAKE_STEP", "0.2")
    # a shell starts its background jobs with SIGINT ignored
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        _wait(lambda: any((tmp_path / "out").rglob("metrics.jsonl")))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match=r"run the same command again to continue \(0 of 4 runs"):
        run(path)
    thread.join()
    stopped = [(word, name) for word, name in journal(notes) if word.startswith("stop@")]
    assert len(stopped) == 1
    step = stopped[0][0].removeprefix("stop@")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setenv("FAKE_STEP", "0")
    run(path)
    _ended_once(notes, RUNS)
    # it went on where it stopped, and before anything new was begun
    started = [(word, name) for word, name in journal(notes) if word.startswith("start@")]
    assert started[1] == (f"start@{step}", stopped[0][1])
    assert int(step) > 0


def _process(path: Path, workers: int = 1) -> ForkProcess:
    """A study in a process of its own, forked to spare it the imports."""
    process = multiprocessing.get_context("fork").Process(
        target=run, args=(path,), kwargs={"workers": workers}
    )
    process.start()
    return process


def test_processes_share_a_study_and_survive_a_kill(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"mapping": MAPPINGS, "rate": {str(n): {"train.batch_size": n} for n in (1, 2)}}
    path = write_study(tmp_path, axes=axes)
    # long enough that the others meet it at work
    monkeypatch.setenv("FAKE_STEP", "1")
    killed = _process(path)
    _wait(lambda: len(journal(notes)) > 0)
    first = journal(notes)[0][1]
    # the child of a killed worker works on, and nobody else takes its run
    killed.kill()
    killed.join()
    monkeypatch.setenv("FAKE_STEP", "0.05")
    others = [_process(path, workers=2), _process(path)]
    for process in others:
        process.join(120)
    assert [process.exitcode for process in others] == [0, 0]
    names = {
        f"mapping={m},rate={r}/seed-{s}" for m in MAPPINGS for r in axes["rate"] for s in (0, 1)
    }
    _ended_once(notes, names)
    assert [name for word, name in journal(notes) if word == "start@0"].count(first) == 1
    assert {row["state"] for row in _rows(tmp_path, "runs")} == {"finished"}


def test_a_run_whose_worker_and_child_were_killed_is_continued(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path)
    monkeypatch.setenv("FAKE_STEP", "0.3")
    process = _process(path)
    _wait(lambda: any((tmp_path / "out").rglob("metrics.jsonl")))
    process.kill()
    child = int(notes.read_text().split()[2])
    os.kill(child, signal.SIGKILL)
    process.join()
    monkeypatch.setenv("FAKE_STEP", "0")
    run(path)
    _ended_once(notes, RUNS)
    words = [word for word, name in journal(notes) if name == journal(notes)[0][1]]
    assert words[0] == "start@0" and words[1] in ("start@1", "start@2")


def test_shared_steps_are_done_once_before_what_needs_them(tmp_path: Path, notes: Path) -> None:
    needs = {"model.name": "{shared.general}/student"}
    path = write_study(
        tmp_path,
        tasks=TASKS,
        shared={
            "general": {"command": "distill", "recipe": RECIPE},
            "teacher": {
                "command": "finetune",
                "recipe": {**TUNING, "model": {}},
                "per_task": True,
                "overrides": needs,
            },
        },
        overrides={"teacher.model": "{shared.teacher}/student"},
    )
    run(path, workers=3)
    runs = {f"{task}/{name}" for task in ("easy", "hard") for name in RUNS}
    teachers = {"shared/teacher/easy", "shared/teacher/hard"}
    _ended_once(notes, runs | teachers | {"shared/general"})
    words = journal(notes)
    assert words[:2] == [("start@0", "shared/general"), ("end", "shared/general")]
    assert max(words.index(("end", t)) for t in teachers) < min(
        words.index(("start@0", name)) for name in runs
    )
    last = _rows(tmp_path, "axis-mapping")[1]
    # the unit is a seed over both tasks
    assert last["difference seeds"] == "2"


def test_shared_steps_of_a_seed_come_before_its_runs(tmp_path: Path, notes: Path) -> None:
    """So that a study that is stopped has whole seeds."""
    step = {"command": "finetune", "recipe": TUNING, "per_seed": True}
    run(write_study(tmp_path, shared={"teacher": step}))
    _ended_once(notes, RUNS | {f"shared/teacher/seed-{seed}" for seed in (0, 1)})
    names = ended(notes)
    seeds = [int(name[-1]) for name in names]
    assert seeds == sorted(seeds)
    assert [n for n, name in enumerate(names) if name.startswith("shared/")] == [0, 3]


def test_a_shared_step_that_fails_ends_the_study(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path, shared={"teacher": {"command": "finetune", "recipe": TUNING}})
    monkeypatch.setenv("FAKE_FAIL", "shared/teacher")
    with pytest.raises(UserError, match=r"shared\.teacher failed: data\.train: no such column"):
        run(path)
    assert journal(notes) == []


def test_a_study_grows_and_keeps_what_it_has(tmp_path: Path, notes: Path) -> None:
    run(write_study(tmp_path))
    mappings = {**MAPPINGS, "first": {"layer_map": "first"}}
    run(write_study(tmp_path, axes={"mapping": mappings}, seeds=3))
    _ended_once(notes, {f"mapping={m}/seed-{s}" for m in mappings for s in range(3)})


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"name": "another"}, "holds the study 'tried', not 'another'"),
    "another metric": (
        {"metric": {"path": "after.score", "direction": "minimize"}},
        "made by a study file whose metric was another",
    ),
    "another command": (
        {"command": "finetune", "recipe": TUNING, "axes": {"mapping": {"uniform": {}, "last": {}}}},
        "whose command was another",
    ),
    "another recipe": (
        {"overrides": {"train.steps": 6}},
        "mapping=uniform/seed-0 was run with another recipe before",
    ),
}


def test_another_first_seed_is_another_study_where_something_has_it(
    tmp_path: Path, notes: Path
) -> None:
    run(write_study(tmp_path, vary=["order"]))
    with pytest.raises(UserError, match="mapping=uniform/seed-0 was run with another recipe"):
        run(write_study(tmp_path, vary=["order"], seeds=[5, 0, 1]))
    _ended_once(notes, RUNS)


@pytest.mark.parametrize("name", OTHERS)
def test_the_storage_of_another_study_is_refused_and_kept(
    name: str, tmp_path: Path, notes: Path
) -> None:
    run(write_study(tmp_path))
    trials = _trials(tmp_path / "out" / "study.db")
    changes, expected = OTHERS[name]
    path = write_study(tmp_path, **changes)
    for report_only in (False, True):
        with pytest.raises(UserError) as caught:
            run(path, report_only=report_only)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
        assert _trials(tmp_path / "out" / "study.db") == trials
    _ended_once(notes, RUNS)


def _trials(path: Path) -> list[Any]:
    connection = sqlite3.connect(path)
    tables = ("studies", "trials", "trial_user_attributes", "study_user_attributes")
    rows = [connection.execute(f"select * from {table}").fetchall() for table in tables]
    connection.close()
    return rows


def _no_database(path: Path) -> None:
    path.write_text("precious")


def _database_of_something_else(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("create table diary (day text)")
    connection.commit()
    connection.close()


def _study_of_somebody_else(path: Path) -> None:
    optuna.create_study(study_name="theirs", storage=f"sqlite:///{path}")


def _folder_of_something_else(path: Path) -> None:
    path.with_name("thesis.txt").write_text("precious")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_no_database, "can't be read as a storage"),
        (_database_of_something_else, "is a database of something else"),
        (_study_of_somebody_else, "holds the study 'theirs', not 'tried'"),
        (_folder_of_something_else, "is not empty and holds no study (thesis.txt)"),
    ],
)
def test_what_is_not_ours_is_left_alone(
    spoil: Callable[[Path], None], expected: str, tmp_path: Path, notes: Path
) -> None:
    path = write_study(tmp_path)
    (tmp_path / "out").mkdir()
    spoil(tmp_path / "out" / "study.db")
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError) as caught:
        run(path)
    assert expected in str(caught.value)
    assert {p: p.read_bytes() for p in before} == before
    assert journal(notes) == []


def test_report_only_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no study yet"):
        run(write_study(tmp_path), report_only=True)
    with pytest.raises(UserError, match="--workers is 0"):
        run(write_study(tmp_path), workers=0)


def test_the_forecast_counts_no_run_that_was_there_before() -> None:
    counts = iter([(4, 10), (6, 10), (6, 10)])
    store: Any = SimpleNamespace(run_counts=lambda: next(counts))
    runner: Any = SimpleNamespace(began=time.monotonic() - 100, found=1)
    watcher = Watcher(store, runner, Reporter(silent=True))
    assert watcher._remaining() == "7 min left"
    runner.found = 2
    assert watcher._remaining() == ""


@pytest.mark.parametrize("stages", [0, 2])
def test_finished_runs_keep_what_was_asked_for(stages: int, tmp_path: Path, notes: Path) -> None:
    one = {"losses": {"hidden": {"weight": 1}}}

    def kept(keep: str) -> set[str]:
        folder = tmp_path / keep
        folder.mkdir()
        recipe = {**RECIPE, "stages": [one] * stages} if stages else RECIPE
        run(write_study(folder, keep=keep, recipe=recipe))
        made = (p for p in folder.rglob("*") if p.name in ("student", "checkpoints"))
        return {str(p).split("/run/")[1] for p in made}

    everything = {"student", "checkpoints"}
    everything |= {f"stage-{n}/{name}" for n in range(1, stages + 1) for name in everything}
    assert kept("scores") == set()
    assert kept("students") == {"student"}
    assert kept("all") == everything


def test_a_claim_is_held_by_one_and_outlives_its_worker_in_a_child(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "claim"
    claim = Claim.take(path)
    assert claim is not None and Claim.take(path) is None
    assert path.read_text() == f"{os.getpid()}\n"
    with subprocess.Popen(["sleep", "60"], pass_fds=(claim.handle,)) as child:
        claim.release()
        assert Claim.take(path) is None
        child.kill()
    again = Claim.take(path)
    assert again is not None
    again.release()


def test_who_waits_for_another_process_says_so(tmp_path: Path, notes: Path) -> None:
    path = write_study(tmp_path)
    plan = Plan(load_study(path), path)
    store = Store(plan)
    store.add_work()
    work = store.take()
    assert work is not None
    # as another process leaves it that is stopped by Ctrl-Z
    os.pwrite(work.claim.handle, b"1\n".ljust(9), 0)
    said = []

    class Listener(Reporter):
        def say(self, text: str) -> None:
            said.append(text)
            if "waiting" in text:
                work.claim.release()

    run(path, reporter=Listener(silent=True))
    waiting = f"3/4  waiting for what another process has begun: {work.name} (process 1)"
    assert [text for text in said if "waiting" in text] == [waiting]
    _ended_once(notes, RUNS)


def test_a_database_that_is_held_or_finds_no_room_is_one_line(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path)
    run(path)
    monkeypatch.setattr("fastkd.study.opening.BUSY_SECONDS", 0.1)
    path = write_study(tmp_path, seeds=3)
    # a reader lets nobody write, who writes with a journal beside it lets nobody read
    for holds, words in (("begin", ["select * from trials"]), ("begin exclusive", [])):
        other = sqlite3.connect(tmp_path / "out" / "study.db", isolation_level=None)
        for statement in (holds, *words):
            other.execute(statement).fetchall()
        with pytest.raises(UserError, match=r"study\.db was held by another process for 0\.1 s "):
            run(path)
        other.close()
    full = optuna.exceptions.StorageInternalError("the commit")
    full.__cause__ = sqlite3.OperationalError("database or disk is full")
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"\(.* disk is full\)"):
        patched.setattr(Store, "take", raising(full))
        run(path)
    run(path)
    _ended_once(notes, RUNS | {f"mapping={m}/seed-2" for m in MAPPINGS})


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_given: object) -> None:
        raise error

    return fail


def test_a_disk_without_locks_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_given: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fastkd.study.locks.fcntl.flock", flock)
    with pytest.raises(UserError, match=r"study\.lock can't be locked \(No locks available\), "):
        run(write_study(tmp_path))


@pytest.mark.parametrize("name", ["50%3Dx", "a?b", "a#b", "{x}"])
def test_an_output_may_have_signs_that_mean_something_in_a_url(
    tmp_path: Path, notes: Path, name: str
) -> None:
    path = write_study(tmp_path, output=str(tmp_path / name / "out"))
    run(path)
    run(path)
    # the second start found what the first one made
    assert len(ended(notes)) == 4
    assert (tmp_path / name / "out" / "study.db").is_file()
    assert {made.name for made in tmp_path.iterdir()} <= {name, path.name, notes.name}
