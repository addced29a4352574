"""A run that is killed at any moment ends, once resumed, where an uninterrupted one does: bit for
bit."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from pathlib import Path

import pytest
from tiny_runs import (
    keys,
    make_recipe,
    read_losses,
    read_weights,
    run_command,
    run_script,
    run_variants,
)

import fastkd
from fastkd.training.run_folder import RunFolder

MOMENTS = (
    "before the first checkpoint",
    "between two checkpoints",
    "in the middle of a file",
    "before the manifest",
    "after the manifest, before latest",
    "in the last evaluation",
    "in the export",
)
SETTINGS = {"train.checkpoint_every": 2, "train.keep_checkpoints": 1}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # dropout makes the random numbers matter
    student = {"layers": 2, "hidden_size": 24, "intermediate_size": 48, "dropout": 0.1}
    return make_recipe(tmp_path_factory.mktemp("resume"), student=student)


def _overrides(run: Path, **more: object) -> list[str]:
    return keys({"run.output": str(run), **SETTINGS, **more})


def _run_of(recipe: Path, moment: str) -> Path:
    return recipe.parent / moment.replace(" ", "-").replace(",", "")


@pytest.fixture(scope="module")
def resumed(recipe: Path) -> str:
    """Kill a run at every moment, then run one that is never killed and resume the others."""
    for moment in MOMENTS:
        arguments = (moment, "0", str(recipe), *_overrides(_run_of(recipe, moment)))
        killed = run_script("disturbed_run.py", *arguments)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
        assert not (_run_of(recipe, moment) / "summary.json").exists()
    runs = [recipe.parent / "whole", *(_run_of(recipe, moment) for moment in MOMENTS)]
    # here: another seed of its hashes than that of the process that was killed
    here = _run_of(recipe, "between two checkpoints")
    said = run_variants(recipe, [_overrides(run) for run in runs if run != here])
    with contextlib.redirect_stdout(io.StringIO()) as resumed:
        fastkd.distill(recipe, {"run.output": str(here), **SETTINGS}, resume=True)
    return said + resumed.getvalue()


@pytest.fixture
def whole(recipe: Path, resumed: str) -> Path:
    """The run that was never interrupted."""
    return recipe.parent / "whole"


def _assert_identical(run: Path, other: Path) -> None:
    mine, theirs = read_weights(run), read_weights(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert weight.equal(theirs[name]), name
    assert read_losses(run) == read_losses(other)
    first, second = (json.loads((path / "summary.json").read_text()) for path in (run, other))
    assert (first["before"], first["after"]) == (second["before"], second["after"])


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_bit_identical(
    recipe: Path, whole: Path, resumed: str, moment: str
) -> None:
    run = _run_of(recipe, moment)
    continued = f"continuing from {run}" in resumed
    assert continued == (moment != "before the first checkpoint")
    _assert_identical(run, whole)


def test_steps_that_are_made_again_are_told(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that ended before its first checkpoint."""
    given = {"run.output": str(recipe.parent / "no-checkpoint")}

    def end(step: int, line: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastkd.distill(recipe, given, on_step=end)
    assert "made again" not in capsys.readouterr().out
    again = fastkd.distill(recipe, given, resume=True)
    said = capsys.readouterr().out
    assert "its first 3 steps are made again; train.checkpoint_every=N writes one" in said
    assert [line["step"] for line in RunFolder(again.folder).read_metrics()][-1] == 6


def test_a_rank_that_dies_while_writing_costs_one_checkpoint(recipe: Path) -> None:
    """Rank 1 dies half-way through its own file, which DeepSpeed's `latest` would not notice."""
    whole, run = recipe.parent / "whole-2", recipe.parent / "killed-2"
    moment = "in the middle of a file of rank 1"
    killed = run_script("disturbed_run.py", moment, "1", str(recipe), *_overrides(run), ranks=2)
    assert killed.returncode != 0
    assert (run / "checkpoints" / "step-00000004").is_dir()
    output = run_variants(recipe, [_overrides(whole), _overrides(run)], ranks=2)
    assert f"continuing from {run / 'checkpoints' / 'step-00000002'}" in output
    _assert_identical(run, whole)


def test_interrupt_writes_a_checkpoint_and_says_how_to_go_on(recipe: Path, whole: Path) -> None:
    run = recipe.parent / "interrupted"
    arguments = _overrides(run, **{"train.checkpoint_every": 0})
    stopped = run_script("disturbed_run.py", "Ctrl-C in step 3", "0", str(recipe), *arguments)
    assert stopped.returncode == 130, stopped.stderr[-2000:]
    assert "continue with --resume" in stopped.stderr.strip().splitlines()[-1]
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == ["step-00000003"]
    resumed = run_command("distill", str(recipe), *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    _assert_identical(run, whole)


def test_a_stream_is_the_same_with_processes_and_after_a_stop(recipe: Path) -> None:
    """What was read and prepared ahead is neither lost nor saved."""
    alone, stopped = recipe.parent / "streamed-alone", recipe.parent / "streamed-stopped"
    stream = {"data.streaming": True, "data.shuffle_buffer": 5}
    helped = _overrides(stopped, **stream, **{"data.workers": 2})
    done = run_script("disturbed_run.py", "Ctrl-C in step 3", "0", str(recipe), *helped)
    assert done.returncode == 130, done.stderr[-2000:]
    run_variants(recipe, [_overrides(alone, **stream), helped])
    _assert_identical(stopped, alone)


def test_finished_run_is_left_alone(recipe: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != "report.html"}
    done = run_command("distill", str(recipe), *_overrides(whole), "--resume")
    assert done.returncode == 0
    assert "is finished" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != "report.html"} == before


def test_resume_refuses_another_recipe(recipe: Path, whole: Path) -> None:
    done = run_command(
        "distill", str(recipe), *_overrides(whole), "train.learning_rate=0.5", "--resume"
    )
    assert done.returncode == 2
    assert "train.learning_rate=0.001" in done.stderr
