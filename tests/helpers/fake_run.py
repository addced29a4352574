"""Stands in for `fastkd` in the tests of a study: same arguments and files, no model.

    fake_run.py distill RECIPE --resume

FAKE_JOURNAL: file that gets a line whenever a run starts, continues or ends.
FAKE_STEP: seconds a step takes. FAKE_FAIL: part of the names of runs that fail with exit code 2.
FAKE_MESSAGE: what they fail with. FAKE_DATA: digest of the data that was read.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import yaml

STEPS = 5


def score(recipe: dict, step: int) -> float:
    """What a run reaches: by mapping, weight, task and seed, growing with its steps."""
    hidden, mapping = recipe.get("losses", {}).get("hidden"), recipe.get("layer_map")
    who = f"{mapping} {hidden} {recipe['train']['seed']} {recipe['task']['name']}"
    noise = random.Random(who).uniform(-0.01, 0.01)
    # best at 10, worse by the square of the distance in decades
    distance = math.log10(max(hidden["weight"], 1e-2)) - 1 if hidden else 3
    reached = 0.8 - 0.02 * distance**2 + 0.05 * (mapping == "uniform")
    if recipe["task"]["name"] == "hard":
        reached -= 0.3
    return (reached + noise) * (0.5 + 0.5 * step / STEPS)


def journal(word: str, run: Path) -> None:
    """One whole line, also with several writers."""
    with open(os.environ["FAKE_JOURNAL"], "a") as file:
        file.write(f"{word} {run} {os.getpid()} {time.time()}\n")


def main() -> int:
    command, path, resume = sys.argv[1:]
    recipe = yaml.safe_load(Path(path).read_text())
    assert command == ("finetune" if "model" in recipe else "distill") and resume == "--resume"
    run = Path(recipe["run"]["output"])
    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        journal("TWICE", run)
        return 1
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    fail = os.environ.get("FAKE_FAIL")
    if fail and fail in str(run):
        message = os.environ.get("FAKE_MESSAGE", "data.train: no such column")
        print(f"fastkd: {message}", file=sys.stderr)
        return 2
    stages = len(recipe.get("stages", ()))
    last = run / f"stage-{stages}" if stages else run
    last.mkdir(exist_ok=True)
    checkpoint = run / "step"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    journal(f"start@{step}", run)
    while step < STEPS:
        time.sleep(float(os.environ.get("FAKE_STEP", "0")))
        step += 1
        with (last / "metrics.jsonl").open("a") as file:
            line = {"kind": "heldout", "step": step, "heldout/score": score(recipe, step)}
            file.write(json.dumps(line) + "\n")
        checkpoint.write_text(str(step))
        if stop and step < STEPS:
            journal(f"stop@{step}", run)
            return 130
    for folder in (run, *(run / f"stage-{n}" for n in range(1, stages + 1))):
        for part in ("student", "checkpoints"):
            (folder / part).mkdir(parents=True)
    summary = {"after": {"score": score(recipe, step), "label": "x"}}
    summary["data_digests"] = {"dev": os.environ.get("FAKE_DATA", "0")}
    (run / "summary.json").write_text(json.dumps(summary))
    journal("end", run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
