"""Training steps on GLUE with batches that are padded by length, and with batches without padding.

`python -m benchmarks.padding --glue FOLDER [--steps 16] [--output FILE]`. The teacher is
all-MiniLM-L6-v2 with a head; losses and students are those of `teacher_cache.py`. Two runs of one
recipe, `task.padding` buckets and none, make the same steps in turn, in one process; their losses
must agree. Batches are cut from so many examples that lengths are as similar as in a whole epoch.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine, report
from benchmarks.teacher_cache import BATCH, STAGES, STUDENTS, WARM, first_examples, tune_teacher
from fastkd.distributed import Ranks, joined_ranks
from fastkd.recipe import AnyRecipe, parse_any_recipe
from fastkd.training.loop import read_step, train_step
from fastkd.training.setup import Run, set_up
from fastkd.types import LENGTHS, Inputs

STUDENT = "3 x 384"
# task, losses, examples of a micro-batch
CASES = (
    ("SST-2", "layers", 32),
    ("SST-2", "predictions", 32),
    ("SST-2", "layers", 8),
    ("MRPC", "layers", 32),
    ("RTE", "layers", 32),
)
EXAMPLES = 6400
PADDING = ("buckets", "none")
# of fp32, over the steps of a run
TOLERANCE = 1e-3


def recipe_of(
    folder: Path, teacher: Path, task: dict[str, Any], stage: str, size: int, steps: int
) -> AnyRecipe:
    return parse_any_recipe(
        {
            "teacher": {"model": str(teacher)},
            "student": STUDENTS[STUDENT],
            "losses": STAGES[stage],
            "task": task,
            "train": {
                "steps": steps,
                "batch_size": BATCH,
                "micro_batch_size": size,
                "learning_rate": 5e-5,
            },
            "run": {"output": str(folder / "run")},
        }
    )


def compared(recipes: dict[str, AnyRecipe], ranks: Ranks) -> dict[str, Any]:
    """The same steps of both, in turn.

    Raises:
        AssertionError: their losses differ.
    """
    runs = {name: set_up(recipe, ranks, progress=False) for name, recipe in recipes.items()}
    feeds = {name: run.micro_batches() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    tokens = {name: 0 for name in (*runs, "texts")}
    for step in range(recipes["none"].train.steps):
        losses = {}
        for name, run in runs.items():
            batches = read_step(run, feeds[name], step)
            tokens[name] += sum(batch["input_ids"].numel() for batch in batches)
            tokens["texts"] += sum(_lengths(batch) for batch in batches)
            losses[name], seconds = _timed(run, batches)
            times[name].append(seconds)
        torch.testing.assert_close(losses["none"], losses["buckets"], rtol=TOLERANCE, atol=1e-4)
    assert tokens["none"] == tokens["texts"], tokens
    kept = {name: values[WARM:] for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in kept.items()}
    ratios = [a / b for a, b in zip(kept["buckets"], kept["none"], strict=True)]
    return {
        "tokens computed": {name: tokens[name] for name in runs},
        "tokens, padded / none": round(tokens["buckets"] / tokens["none"], 3),
        "median ms of a step": {name: round(1e3 * value, 1) for name, value in medians.items()},
        "step, padded / none, ratio of medians": round(medians["buckets"] / medians["none"], 3),
        "quartiles of pairs": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
    }


def _lengths(batch: Inputs) -> int:
    """Tokens of a packed micro-batch, by its lengths; 0 of a padded one."""
    return int(batch[LENGTHS].sum()) if LENGTHS in batch else 0


def _timed(run: Run, batches: Any) -> tuple[Tensor, float]:
    start = time.perf_counter()
    losses = train_step(run, batches)
    return losses, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {
        "what": f"up to {EXAMPLES} examples of each task, {BATCH} a step, {given.steps} steps",
        "student": STUDENT,
        **machine(),
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as name, joined_ranks() as ranks:
        tuned: dict[str, tuple[Path, dict[str, Any]]] = {}
        for task, stage, size in CASES:
            folder = Path(name) / task
            if task not in tuned:
                folder.mkdir()
                source = first_examples(given.glue, folder / task, EXAMPLES, task)
                section = {"name": task, "source": str(source), "cache": str(folder / "cache")}
                # it needs a head, of which no time depends on how good it is
                tuned[task] = tune_teacher(folder, section, ranks, steps=1), section
            teacher, section = tuned[task]
            recipes = {
                padding: recipe_of(
                    folder, teacher, {**section, "padding": padding}, stage, size, given.steps
                )
                for padding in PADDING
            }
            key = f"{task}, {stage}, micro-batches of {size}"
            found["cases"][key] = compared(recipes, ranks)
            print(key, found["cases"][key], file=sys.stderr, flush=True)
    report(found, given.output)


if __name__ == "__main__":
    main()
