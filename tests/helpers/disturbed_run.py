"""Run a recipe and disturb one rank at one named moment: `kill -9`, Ctrl-C, a full disk.

Used as `python disturbed_run.py MOMENT RANK recipe.yaml overrides...`, also under torchrun; with
`finetune` before the recipe that is run, and at the moment `-` nothing happens.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastkd import distributed
from fastkd.cli import main
from fastkd.reporting import report
from fastkd.training import bookkeeping, loop, parts, teacher
from fastkd.training.checkpoint import checkpoints
from fastkd.training.export import student

# more bytes than metrics take, fewer than the weights of a tiny student
FILE_LIMIT = 20_000


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _stop_by(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _fill_disk(limit: int = FILE_LIMIT) -> None:
    # the operating system then fails every writer, whatever library it is in
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _at_call(
    number: int, holder: Any, name: str, act: Callable[[], None], *, after: bool = False
) -> None:
    """Act at the given call of a function, before it does anything or after it did its work."""
    original: Callable[..., Any] = getattr(holder, name)
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            act()
        result = original(*arguments, **keywords)
        if calls == number and after:
            act()
        return result

    setattr(holder, name, counted)


def _half_written(number: int) -> None:
    """Die in the middle of a file of a checkpoint."""
    original = checkpoints.write_state
    calls = 0

    def write(path: Path, tree: Any) -> Any:
        nonlocal calls
        calls += 1
        written = original(path, tree)
        if calls == number:
            os.truncate(path, path.stat().st_size // 2)
            _die()
        return written

    checkpoints.write_state = write


def _overflow_from(number: int) -> None:
    """Let the teacher's states of one layer be infinite at one call, and at every look back."""
    original = teacher.TeacherRunner.__call__
    seen: list[int] = []

    def capture(self: Any, inputs: Any, **keywords: Any) -> Any:
        states = original(self, inputs, **keywords)
        key = hash(tuple(inputs["input_ids"].flatten().tolist()))
        seen.append(key)
        if key == seen[min(number, len(seen)) - 1] and len(seen) >= number:
            states.hidden[2] = states.hidden[2] * float("inf")
        return states

    teacher.TeacherRunner.__call__ = capture


def _work_alone() -> None:
    """Be busy without a word to the others, nearly for ever."""
    distributed.LOOK_SECONDS, distributed.GRACE_SECONDS = 0.1, 1.0
    time.sleep(600)


# with a checkpoint every second step, step 4's is the second one; each has three files at stage 1
MOMENTS: dict[str, Callable[[], None]] = {
    "before the first checkpoint": lambda: _at_call(2, loop, "train_step", _die),
    "between two checkpoints": lambda: _at_call(4, loop, "train_step", _die),
    "in the middle of a file": lambda: _half_written(5),
    # the other ranks write two files a checkpoint
    "in the middle of a file of rank 1": lambda: _half_written(3),
    "before the manifest": lambda: _at_call(2, checkpoints.Checkpoints, "_finish", _die),
    "after the manifest, before latest": lambda: _at_call(
        3, checkpoints, "write_whole", _die, after=True
    ),
    # the first one comes before step 1
    "in the last evaluation": lambda: _at_call(2, bookkeeping, "evaluate", _die, after=True),
    "in the export": lambda: _at_call(1, loop, "export_student", _die),
    "Ctrl-C in step 3": lambda: _at_call(3, loop, "train_step", _press_ctrl_c),
    # the first call tries the losses, and 30 held-out blocks are 4 parts
    "teacher overflows in the evaluation": lambda: _overflow_from(2),
    "teacher overflows in step 2": lambda: _overflow_from(7),
    "SIGINT while models load": lambda: _at_call(1, parts, "load_teacher", _stop_by(signal.SIGINT)),
    "SIGTERM while models load": lambda: _at_call(
        1, parts, "load_teacher", _stop_by(signal.SIGTERM)
    ),
    "SIGHUP while data loads": lambda: _at_call(
        1, parts, "make_datamodule", _stop_by(signal.SIGHUP)
    ),
    "SIGTERM in the export": lambda: _at_call(1, loop, "export_student", _stop_by(signal.SIGTERM)),
    "SIGHUP in step 3": lambda: _at_call(3, loop, "train_step", _stop_by(signal.SIGHUP)),
    "killed while models load": lambda: _at_call(1, parts, "load_teacher", _die),
    "alone in step 3": lambda: _at_call(3, loop, "train_step", _work_alone),
    "stuck in step 3": lambda: _at_call(3, loop, "train_step", _stop_by(signal.SIGSTOP)),
    "disk full from step 3": lambda: _at_call(3, loop, "train_step", _fill_disk),
    "disk full in the export": lambda: _at_call(1, loop, "export_student", _fill_disk),
    "disk full as the tokenizer is written": lambda: _at_call(
        1, PreTrainedTokenizerBase, "save_pretrained", lambda: _fill_disk(1000)
    ),
    "disk full as projections are written": lambda: _at_call(
        1, student, "save_file", lambda: _fill_disk(1000)
    ),
    "disk full as the student is copied": lambda: _at_call(1, shutil, "copytree", _fill_disk),
    "disk full in the report": lambda: _at_call(1, report, "html_table", lambda: _fill_disk(1000)),
}

if __name__ == "__main__":
    moment, victim = sys.argv[1], sys.argv[2]
    if moment != "-" and os.environ.get("RANK", "0") == victim:
        MOMENTS[moment]()
    given = sys.argv[3:]
    sys.argv = ["fastkd", *([] if given[0] == "finetune" else ["distill"]), *given]
    main()
