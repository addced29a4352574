"""A disk that is full or lost at any write of a run: one line, and a resumed run that finishes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from tiny_runs import make_recipe, run_command, run_script
from tiny_training import save_classifier, write_recipe, write_task

# all of them take minutes
EVERY = int(os.environ.get("FASTKD_DISK_EVERY", "12"))
# what C++ and Rust write, the copy of a student of stages, and the report
INSIDE = (
    "disk full in the export",
    "disk full as the tokenizer is written",
    "disk full as projections are written",
    "disk full in the report",
)
SHORT = {"steps": 2, "warmup_steps": 0, "checkpoint_every": 1, "keep_checkpoints": 1}


@pytest.mark.parametrize(
    ("number", "first", "every"),
    [(errno.ENOSPC, 1, EVERY), (errno.EROFS, min(4, EVERY), 2 * EVERY)],
)
def test_a_write_that_fails_is_one_line_and_costs_nothing_that_was_whole(
    number: int, first: int, every: int, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, train=SHORT)
    done = run_script("failing_disk.py", str(recipe), str(number), str(first), str(every))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    # recipe, environment, metrics, two checkpoints, export, summary, report
    assert max(map(int, found)) > 30
    for write, (said, later) in found.items():
        assert "\n" not in said and f"failed ({os.strerror(number)})" in said, (write, said)
        assert later == "finished", (write, later)
        run = tmp_path / f"failing-{number}-{write}"
        assert (run / "report.html").is_file() and not list(run.rglob(".*")), write


def assert_one_line(moment: str, recipe: Path, *more: str) -> None:
    """See that a run whose disk fills up at a moment says so and how to go on."""
    done = run_script("disturbed_run.py", moment, "0", str(recipe), *more)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("fastkd: ")]
    assert "writing failed (" in said and "(ulimit -f) and continue with --resume" in said


def test_so_it_is_of_what_other_languages_write(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, train=SHORT)
    for moment in INSIDE:
        # each goes on where the last one ended
        assert_one_line(moment, recipe, "--resume")
    done = run_command("distill", str(recipe), "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "report.html").is_file()


def test_so_it_is_of_a_student_that_stages_leave(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier")
    stages = [{"train": {"steps": 1}}, {"train": {"steps": 1}}]
    recipe = write_recipe(tmp_path, "staged", losses={"hidden": {}}, stages=stages)
    assert_one_line("disk full as the student is copied", recipe)
    run = tmp_path / "staged"
    assert not (run / "student").exists() and (run / "stage-2" / "student").is_dir()
