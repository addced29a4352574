"""What stays of a finished run in one file, and how its held-out numbers are said in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastkd.training.engine import NoTeacher
from fastkd.training.evaluate import (
    peak_memory,
    tokens_per_second,
)
from fastkd.training.run_folder import RunFolder
from fastkd.training.setup import Run

# as much as two evaluations of the same weights may differ by, relatively
_NOISE = 1e-5


def summarise(run: Run, folder: RunFolder, seconds: float) -> dict[str, Any]:
    """The summary of a run that has made its last step; collective over the ranks."""
    recipe, ranks, datamodule = run.recipe, run.ranks, run.datamodule
    part = next(iter(datamodule.heldout(run.plan.micro_batch_size, ranks)))
    inputs = run.move(part.inputs)
    run.engine.eval()
    speeds = {"student": tokens_per_second(run.student, inputs, ranks)}
    parameters = {"student": run.initialisation.total}
    if not isinstance(run.teacher, NoTeacher):
        speeds["teacher"] = tokens_per_second(run.teacher.embed, inputs, ranks)
        parameters["teacher"] = run.teacher_parameters
    records = folder.read_metrics() if ranks.is_main else []
    heldout = [_numbers(record) for record in records if record["kind"] == "heldout"]
    teacher = [_numbers(record) for record in records if record["kind"] == "teacher"]
    has_layers = not isinstance(run.teacher, NoTeacher)
    return {
        "run": str(folder.path),
        "steps": recipe.train.steps,
        **datamodule.totals(recipe.train.steps * recipe.train.batch_size),
        "layer_map": run.layers.rows() if has_layers else None,
        "before": heldout[0] if heldout else None,
        "after": heldout[-1] if heldout else None,
        "worse": worsened(heldout[0], heldout[-1]) if heldout else [],
        **({"teacher": teacher[0]} if teacher else {}),
        "parameters": parameters,
        "forward_tokens_per_second": speeds,
        "peak_memory_bytes": peak_memory(ranks),
        "peak_memory_of": "GPU" if ranks.device.type == "cuda" else "process",
        "world_size": ranks.world_size,
        "seconds": seconds,
    }


def worsened(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a run left worse than it found it, in words; nothing where all is as it should be.

    Args:
        before: held-out numbers before the first step.
        after: those after the last one.
    """
    found = []
    if after["total"] > before["total"] * (1 + _NOISE):
        found.append(f"held-out loss {after['total']:.4g}, before {before['total']:.4g}")
    if after.get("score", 0.0) < before.get("score", 0.0):
        found.append(f"score {after['score']:.4f}, before {before['score']:.4f}")
    return found


def judged_parts(judged: Mapping[str, Any]) -> list[str]:
    """What a evaluator said, for a line of a log."""
    parts = []
    if judged.get("sentence_cosine") is not None:
        parts.append(f"cosine {judged['sentence_cosine']:.4f}")
    if "score" in judged:
        parts.append(f"score {judged['score']:.4f}")
    several = len(judged.get("scores", {})) > 1
    for name, scores in judged.get("scores", {}).items():
        parts += [
            f"{name} {metric} {value:.4f}" if several else f"{metric} {value:.4f}"
            for metric, value in scores.items()
        ]
    return parts


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("kind", "step")}
