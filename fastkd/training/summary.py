"""What stays of a finished run in one file, and how its held-out numbers are said in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastkd.training.engine import NoTeacher
from fastkd.training.evaluate import (
    peak_memory,
    tokens_per_second,
)
from fastkd.training.profile import REST, Profile
from fastkd.training.run_folder import RunFolder
from fastkd.training.setup import Run
from fastkd.types import teacher_inputs

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
        speeds["teacher"] = tokens_per_second(run.teacher.embed, teacher_inputs(inputs), ranks)
        parameters["teacher"] = run.teacher_parameters
    records = folder.read_metrics() if ranks.is_main else []
    heldout = [_numbers(record) for record in records if record["kind"] == "heldout"]
    teacher = [_numbers(record) for record in records if record["kind"] == "teacher"]
    profile = profile_of(run)
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
        **({} if profile is None else {"profile": profile}),
    }


def profile_of(run: Run) -> dict[str, Any] | None:
    """What a run's profile has measured, `None` where there is none; collective over the ranks.

    `phases` holds, by name, milliseconds of a step and their share of it, which add up to 1; also
    what they cost the host (`clocks_of`) and, of several ranks, the milliseconds of the slowest.
    """
    profile, ranks = run.profile, run.ranks
    if not isinstance(profile, Profile) or not profile.steps:
        return None
    by_clock = profile.seconds()
    if isinstance(run.teacher, NoTeacher):
        for seconds in by_clock:
            seconds[REST] += seconds.pop("teacher")
    total = sum(by_clock[0].values())
    everyone = ranks.gather(by_clock[0])
    cost = f"{profile.clocks[1].name}_milliseconds"
    phases = {}
    for name, own in by_clock[0].items():
        phases[name] = {"milliseconds": own * 1e3, "share": own / total}
        phases[name][cost] = by_clock[1][name] * 1e3
        if ranks.world_size > 1:
            phases[name]["slowest_milliseconds"] = max(each[name] for each in everyone) * 1e3
    memory = {} if profile.memory is None else {"memory_bytes": profile.memory.parts}
    return {"steps": profile.steps, "milliseconds": total * 1e3, "phases": phases, **memory}


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
    for name, value in judged.get("agreement", {}).items():
        parts.append(f"{name.replace('_', ' ')} {value:.4f}")
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
