"""Run a recipe and die, as `kill -9` would do it, at one named moment of step 4's checkpoint.

Used as `python killed_run.py MOMENT recipe.yaml overrides...`, also under torchrun.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastkd import checkpoint, train
from fastkd.cli import main


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at_call(holder: Any, name: str, number: int, *, after: bool = False) -> None:
    """Die at the given call of a function, before it does anything or after it did its work."""
    original: Callable[..., Any] = getattr(holder, name)
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            _die()
        result = original(*arguments, **keywords)
        if calls == number:
            _die()
        return result

    setattr(holder, name, counted)


def _half_written(number: int) -> None:
    """Die in the middle of a file that DeepSpeed writes."""
    original = torch.save
    calls = 0

    def save(value: Any, target: Any, *arguments: Any, **keywords: Any) -> None:
        nonlocal calls
        calls += 1
        original(value, target, *arguments, **keywords)
        if calls == number:
            path = Path(target if isinstance(target, str | os.PathLike) else target.name)
            os.truncate(path, path.stat().st_size // 2)
            _die()

    torch.save = save


# with a checkpoint every second step, step 4's is the second one; each has three files at stage 1
MOMENTS: dict[str, Callable[[], None]] = {
    "before the first checkpoint": lambda: _die_at_call(train, "train_step", 2),
    "between two checkpoints": lambda: _die_at_call(train, "train_step", 4),
    "in the middle of a file": lambda: _half_written(5),
    # the other ranks write two files a checkpoint
    "in the middle of a file of rank 1": lambda: _half_written(3),
    "before the manifest": lambda: _die_at_call(checkpoint.Checkpoints, "_finish", 2),
    "after the manifest, before latest": lambda: _die_at_call(
        checkpoint, "write_whole", 3, after=True
    ),
    "before old checkpoints are dropped": lambda: _die_at_call(
        checkpoint, "write_whole", 4, after=True
    ),
    "in the export": lambda: _die_at_call(train, "export_student", 1),
}

if __name__ == "__main__":
    moment, victim = sys.argv[1], sys.argv[2]
    if os.environ.get("RANK", "0") == victim:
        MOMENTS[moment]()
    sys.argv = ["fastkd", "distill", *sys.argv[3:]]
    main()
