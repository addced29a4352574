"""Runs an hour of a study, beside the same runs as commands of their own.

`python -m benchmarks.study_speed --glue FOLDER [--steps 80] [--seeds 4] [--output FILE]`. The
teacher is all-MiniLM-L6-v2 with a head for MRPC, the students are three layers of it under two
attention losses. The same runs are made three times, two at a time: each by `fastkd distill` in a
process of its own, by `fastkd study`, and by it with the teacher's states in a cache, which it has
to fill first. What a study needs is in its time: its start and its report.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine, report
from benchmarks.teacher_cache import first_examples, tune_teacher
from fastkd.distributed import joined_ranks

AT_A_TIME = 2
EXAMPLES = 3200
KINDS = ("score_mse", "kl")
CACHE = {"cache": "exact", "cache_attention": "recomputed", "cache_states": "all"}
# the folder of a run below that of all, by its loss and seed
WAYS: dict[str, str] = {
    "commands": "{kind}/seed-{seed}",
    "study": "runs/attention={kind}/seed-{seed}/run",
    "study, cached": "runs/attention={kind}/seed-{seed}/run",
}


def recipe_of(teacher: Path, source: Path, steps: int) -> dict[str, Any]:
    return {
        "teacher": {"model": str(teacher), "dtype": "bfloat16"},
        "student": {"layers": 3},
        "losses": {
            "attention": {},
            "hidden": {},
            "embedding": {},
            "logits": {"kind": "cross_entropy"},
        },
        "task": {"name": "MRPC", "source": str(source), "cache": str(source / "tokens")},
        "train": {
            "steps": steps,
            "batch_size": 16,
            "learning_rate": 3e-4,
            "warmup_share": 0.1,
            "precision": "bf16",
        },
        "run": {"output": "given with each run"},
    }


def run_commands(recipe: dict[str, Any], folder: Path, seeds: int) -> None:
    """Each run by a command, as many at a time as a study makes."""
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    def make(run: tuple[str, int]) -> None:
        kind, seed = run
        place = folder / WAYS["commands"].format(kind=kind, seed=seed)
        given = f"losses.attention.kind={kind}", f"train.seed={seed}", f"run.output={place}"
        start("distill", str(path), *given)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(make, [(kind, seed) for seed in range(seeds) for kind in KINDS]))


def run_study(recipe: dict[str, Any], folder: Path, seeds: int) -> None:
    study = {
        "name": "speed",
        "output": str(folder),
        "recipe": recipe,
        "axes": {"attention": {kind: {"losses.attention.kind": kind} for kind in KINDS}},
        "seeds": seeds,
        "metric": {"path": "after.score", "direction": "maximize"},
        "keep": "scores",
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(study))
    start("study", str(path), "--workers", str(AT_A_TIME))


def start(*arguments: str) -> None:
    """The `fastkd` command, to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fastkd", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"fastkd {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")


def scores_of(folder: Path, way: str, seeds: int) -> list[float]:
    runs = [WAYS[way].format(kind=kind, seed=seed) for kind in KINDS for seed in range(seeds)]
    summaries = [json.loads((folder / run / "summary.json").read_text()) for run in runs]
    return [summary["after"]["score"] for summary in summaries]


def measured(teacher: Path, source: Path, folder: Path, steps: int, seeds: int) -> dict[str, Any]:
    """Seconds and scores of the three ways.

    Raises:
        AssertionError: a study's runs are other runs.
    """
    plain = recipe_of(teacher, source, steps)
    cached = {**plain, "teacher": {**plain["teacher"], **CACHE, "cache_folder": str(folder / "c")}}
    ways: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
        "commands": (run_commands, plain),
        "study": (run_study, plain),
        "study, cached": (run_study, cached),
    }
    seconds, scores = {}, {}
    for number, (way, (made, recipe)) in enumerate(ways.items()):
        place = folder / f"way-{number}"
        began = time.perf_counter()
        made(recipe, place, seeds)
        seconds[way] = time.perf_counter() - began
        scores[way] = scores_of(place, way, seeds)
        print(f"{way}: {seconds[way]:.0f} s", file=sys.stderr, flush=True)
    assert scores["study"] == scores["commands"], scores
    runs = len(scores["study"])
    return {
        "runs": runs,
        "seconds": {way: round(taken, 1) for way, taken in seconds.items()},
        "runs an hour": {way: round(3600 * runs / taken) for way, taken in seconds.items()},
        "times the commands": {
            way: round(seconds["commands"] / taken, 2) for way, taken in seconds.items()
        },
        "largest difference of a score, cached": max(
            abs(one - other)
            for one, other in zip(scores["study, cached"], scores["study"], strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = first_examples(given.glue, folder / "MRPC", EXAMPLES, "MRPC")
        with joined_ranks() as ranks:
            task = {"name": "MRPC", "source": str(source), "cache": str(source / "tokens")}
            teacher = tune_teacher(folder, task, ranks)
        found = {
            "what": f"runs of {given.steps} steps of 16 examples of MRPC, {AT_A_TIME} at a time",
            **machine(),
            **measured(teacher, source, folder, given.steps, given.seeds),
        }
    report(found, given.output)


if __name__ == "__main__":
    main()
