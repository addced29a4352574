"""metrics.jsonl: one flat table that pandas reads alone, the same names in trackers."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny_runs import make_recipe, run_variants

import fastkd
from fastkd.errors import UserError
from fastkd.files.disk import write_whole
from fastkd.training.metric_lines import (
    evaluation_of,
    make_line,
    numbers_of,
    values_of,
)
from fastkd.training.metrics_file import MetricsFile
from fastkd.training.run_folder import RunFolder

EVALUATION: dict[str, Any] = {
    "losses": {"attention/1-2": 0.5, "hidden/2-4..6": 0.25, "logits": 2.0},
    "total": 2.75,
    "sentence_cosine": None,
    "score": 0.75,
    "scores": {"dev": {"accuracy": 0.5}, "dev_mismatched": {"accuracy": 1.0}},
    "class_f1": {"dev": {"and/or": 0.25}},
    "baseline": {"score": 0.5, "scores": {"dev": {"accuracy": 0.5}}},
    "one_class": {"dev": "and/or"},
    "pairs": {"a/b": 0.9},
    "mteb": {"STS": 0.8},
    "agreement": {"spearman": 0.7},
    "examples": 3,
}


def test_a_line_is_flat_and_gives_its_evaluation_back() -> None:
    line = make_line("heldout", 7, EVALUATION)
    assert not any(isinstance(value, dict) for value in line.values())
    assert evaluation_of(line) == EVALUATION
    assert evaluation_of(json.loads(json.dumps(line))) == EVALUATION
    assert line["heldout/losses/attention/1-2"] == 0.5
    assert line["heldout/scores/dev_mismatched/accuracy"] == 1.0
    assert values_of(line, "losses") == EVALUATION["losses"]
    told = {name: value for name, value, step in numbers_of(line) if step == 7}
    # neither words nor what is not there
    assert told.keys() == line.keys() - {
        *("kind", "step", "time", "heldout/sentence_cosine", "heldout/one_class/dev")
    }
    assert all(isinstance(value, float) for value in told.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    recipe = make_recipe(
        tmp_path_factory.mktemp("flat"), train={"steps": 4, "evaluate_every": 2, "log_every": 2}
    )
    return RunFolder(fastkd.distill(recipe, {"train.checkpoint_every": 2}, quiet=True).folder)


def test_pandas_alone_makes_a_table_of_a_run(run: RunFolder) -> None:
    frame = pd.read_json(run.metrics, lines=True)
    assert not frame.map(lambda value: isinstance(value, dict | list)).any(axis=None)
    assert frame["step"].is_monotonic_increasing
    assert pd.to_datetime(frame["time"]).is_monotonic_increasing
    by_step = frame.groupby("step").first()
    assert by_step["heldout/losses/hidden/1-2"].notna().tolist() == [True, True, True]
    columns = ["loss", "losses/attention/2-4", "weighted/attention/2-4", "learning_rate"]
    columns += ["gradient_norm", "tokens_per_second"]
    for column in columns:
        assert by_step[f"train/{column}"].notna().tolist() == [False, True, True]


def stop_after_four(recipe: Path) -> None:
    """Let a run end after its fourth step is written down, before that step's checkpoint."""

    def stop(step: int, line: dict[str, Any]) -> None:
        if step == 4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fastkd.distill(recipe, quiet=True, on_step=stop)


def rates_of(run: Path) -> list[float]:
    """The learning rates that were written down, by step."""
    lines = RunFolder(run).read_metrics()
    return [line["train/learning_rate"] for line in lines if line["kind"] == "train"]


# of six steps, two of which warm up, up to 1e-3
SCHEDULE = [0.0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4]
CONSTANT = [*SCHEDULE[:3], 1e-3, 1e-3, 1e-3]


@pytest.mark.parametrize(
    ("optimizer", "schedule", "rates"),
    [("adamw", "linear", SCHEDULE), ("muon", "constant", CONSTANT)],
)
def test_the_rate_under_a_step_is_the_one_it_was_made_with(
    tmp_path: Path, optimizer: str, schedule: str, rates: list[float]
) -> None:
    losses = {"projection_learning_rate": 0.1}
    train = {"checkpoint_every": 2, "optimizer": optimizer, "schedule": schedule}
    recipe = make_recipe(tmp_path, losses=losses, train=train)
    stop_after_four(recipe)
    # the fourth step is made again
    run = fastkd.distill(recipe, quiet=True, resume=True).folder
    assert rates_of(run) == pytest.approx(rates)


def test_both_engines_write_down_the_rate_of_the_step(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, train={"log_every": 2})
    runs = {"local": [], "deepspeed": ["deepspeed.wall_clock_breakdown=false"]}
    outputs = {name: tmp_path / name for name in runs}
    run_variants(recipe, [[f"run.output={outputs[n]}", *more] for n, more in runs.items()])
    for output in outputs.values():
        assert rates_of(output) == pytest.approx(SCHEDULE[1::2])


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard (an extra) is missing"
)
@pytest.mark.parametrize("checkpoint_every", [2, 0])
def test_tensorboard_forgets_the_steps_that_are_made_again(
    tmp_path: Path, checkpoint_every: int
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = {"steps": 4, "evaluate_every": 2, "log_every": 1, "checkpoint_every": checkpoint_every}
    recipe = make_recipe(tmp_path, train=train, run={"monitor": "tensorboard"})
    stop_after_four(recipe)
    run = RunFolder(fastkd.distill(recipe, quiet=True, resume=True).folder)
    (folder,) = {file.parent for file in run.path.glob("tensorboard/**/events*")}
    board = EventAccumulator(str(folder))
    board.Reload()
    told = [(name, e.step) for name in board.Tags()["scalars"] for e in board.Scalars(name)]
    made = [(name, step) for line in run.read_metrics() for name, _, step in numbers_of(line)]
    assert sorted(told) == sorted(made)


@pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="trackio (an extra) is not installed"
)
def test_trackio_is_told_every_number_here_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trackio.utils
    from trackio import sqlite_storage

    for module in (trackio.utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    recipe = make_recipe(tmp_path, train={"steps": 2, "warmup_steps": 0})
    run = RunFolder(fastkd.distill(recipe, {"run.monitor": "trackio"}, quiet=True).folder)
    with sqlite3.connect(tmp_path / "trackio" / "fastkd.db") as storage:
        rows = storage.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, *_ in rows} == {str(run.path)}
    told = {(name, step, v) for _, step, text in rows for name, v in json.loads(text).items()}
    made = {(n, s, v) for line in run.read_metrics() for n, v, s in numbers_of(line)}
    assert told == made and len(made) > 20


def test_a_file_that_grows_is_read_on_and_another_one_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    assert list(file.new_lines()) == []

    def append(text: str) -> list[int]:
        with path.open("a") as out:
            out.write(text)
        return [line["step"] for line in file.new_lines()]

    line = '{{"kind": "train", "step": {}}}\n'.format
    assert append(line(1) + line(2)) == [1, 2]
    assert append("") == []
    # half of a line is not lost
    assert append(line(3) + line(4)[:9]) == [3]
    assert append(line(4)[9:] + line(5)) == [4, 5]
    write_whole(path, [line(1), line(7)])
    assert append("") == [1, 7]
    path.write_text(line(8))
    assert append("") == [8] and append(line(9)) == [9]
    with pytest.raises(UserError, match="line 3 is damaged"):
        append("{}\n")


def test_long_metrics_are_rewound_and_gone_through_line_by_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    values = {f"train/losses/attention/{n}-{2 * n}": n / 7 for n in range(200)}
    lines = [{"kind": "train", "step": step, **values} for step in range(1, 301)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = folder.metrics.stat().st_size
    tracemalloc.start()
    try:
        folder.rewind_metrics(200)
        assert sum(line["step"] for line in folder.each_metric()) == 200 * 201 // 2
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 5
    assert folder.read_metrics() == lines[:200]
