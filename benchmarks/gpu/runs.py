"""A run of the `fastkd` command on tiny texts: whole, and killed half-way and continued."""

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# the helpers of the tests, beside the inputs of the benchmarks
import benchmarks.inputs  # noqa: F401
from benchmarks.gpu.record import Record


class Length(NamedTuple):
    """Steps of a run, and after how many of them there is a checkpoint."""

    steps: int
    checkpoint: int


LENGTH, DRY = Length(200, 40), Length(12, 4)
# atomic sums of a GPU differ in the last bits, and 200 steps of Adam make more of them
TOLERANCE = {"cuda": 5e-2, "cpu": 1e-5}
POLL_SECONDS = 0.01


def run(record: Record) -> None:
    """Losses finite and those of the uninterrupted run, and a student that loads."""
    from tiny_runs import make_recipe

    length = DRY if record.device == "cpu" else LENGTH
    with tempfile.TemporaryDirectory() as folder:
        train = {"steps": length.steps, "checkpoint_every": length.checkpoint}
        # a resumed run is compared with another to the last digits
        exact = {"precision": "fp32", "tf32": False}
        recipe = make_recipe(Path(folder), teacher={"dtype": "float32"}, train={**train, **exact})
        record.note(**found_in(recipe, length, record.device))


def found_in(recipe: Path, length: Length, device: str) -> dict[str, object]:
    """The two runs and what is asked of them."""
    from tiny_runs import read_losses

    # side by side: most of their time goes to imports
    uninterrupted = start(recipe, "whole")
    try:
        killed_at = kill_half_way(recipe, length)
        finished(start(recipe, "killed", "--resume"))
        finished(uninterrupted)
    finally:
        uninterrupted.kill()
    whole, resumed = (read_losses(recipe.parent / name) for name in ("whole", "killed"))
    assert len(whole) == len(resumed) == length.steps, (len(whole), len(resumed))
    every = [value for losses in (*whole, *resumed) for value in losses.values()]
    assert all(map(math.isfinite, every)), "a loss is not finite"
    difference = max(
        abs(own[name] - other[name]) / abs(other[name])
        for own, other in zip(resumed, whole, strict=True)
        for name in other
    )
    assert difference <= TOLERANCE[device], f"resumed losses are {difference:.2g} away"
    check_student(recipe.parent / "killed" / "student")
    return {
        "steps": length.steps,
        "killed_after_step": killed_at,
        "first_losses": whole[0],
        "last_losses": whole[-1],
        "largest_difference": difference,
        "tolerance": TOLERANCE[device],
        "student": "loads, all weights finite",
    }


def start(recipe: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    """The command, writing to the folder of this name."""
    output = f"run.output={recipe.parent / name}"
    command = [sys.executable, "-m", "fastkd", "distill", str(recipe), output, *arguments]
    return subprocess.Popen(command)


def finished(process: subprocess.Popen[bytes]) -> None:
    code = process.wait()
    assert code == 0, f"fastkd distill ended with exit code {code}"


def kill_half_way(recipe: Path, length: Length) -> int:
    """Kill a run once half of its steps are made; how many were."""
    metrics = recipe.parent / "killed" / "metrics.jsonl"
    process = start(recipe, "killed")
    made = 0
    while made < length.steps // 2 and process.poll() is None:
        time.sleep(POLL_SECONDS)
        if metrics.exists():
            made = metrics.read_text().count('"kind": "train"')
    os.kill(process.pid, signal.SIGKILL)
    code = process.wait()
    assert code == -signal.SIGKILL, f"it was to be killed, but ended with exit code {code}"
    return made


def check_student(folder: Path) -> None:
    """It loads as any model does, and its weights are finite."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    assert all(bool(weight.isfinite().all()) for weight in model.state_dict().values())
