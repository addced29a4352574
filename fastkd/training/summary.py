"""What stays of a finished run in one file, and how its held-out numbers are said in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastkd.errors import UserError
from fastkd.models import model_bytes
from fastkd.reporting.scores import score_parts
from fastkd.training.cost import Cost
from fastkd.training.introduction import handed_on_notes
from fastkd.training.metric_lines import evaluation_of
from fastkd.training.profile import REST, Profile
from fastkd.training.run_folder import RunFolder
from fastkd.training.setup import Run
from fastkd.training.speed import measure_speed
from fastkd.training.steering import Steering
from fastkd.training.teacher import NoTeacher
from fastkd.types import ModelSource

# as much as two evaluations of the same weights may differ by, relatively
_NOISE = 1e-5
# other numbers of an evaluation, and whether the larger one is the better
_LARGER_IS_BETTER = {
    "sentence_cosine": True,
    "perplexity": False,
    "pseudo_perplexity": False,
    "spearman": True,
    "same_first": True,
    "same_class": True,
    "mean_absolute_difference": False,
}


def summarise(
    run: Run, folder: RunFolder, cost: Cost, steps: int, steering: Steering
) -> dict[str, Any]:
    """The summary of a run that has made its last step; collective over the ranks.

    Args:
        run: which has ended.
        folder: where it is written.
        cost: that it took.
        steps: that it made.
        steering: what its evaluations decided; `after` is of the student that is exported.
    """
    recipe, ranks, datamodule = run.recipe, run.ranks, run.datamodule
    # before passes that are larger than those of training
    seconds, peak = cost.seconds, cost.peak
    run.engine.eval()
    parameters = {"student": run.initialisation.total}
    if not isinstance(run.teacher, NoTeacher):
        parameters["teacher"] = run.first_teacher_parameters
    exported = steering.exported_step(steps)
    before, after, teacher = ranks.from_main(lambda: _evaluations(folder, exported))
    profile = profile_of(run)
    has_layers = not isinstance(run.teacher, NoTeacher)
    return {
        "run": str(folder.path),
        "steps": steps,
        **steering.summary(steps),
        **datamodule.totals(steps * recipe.train.batch_size),
        "data_digests": run.data_digests,
        "layer_map": run.layers.rows() if has_layers else None,
        "depths": [run.layers.student_layers, run.layers.teacher_layers] if has_layers else None,
        "before": before,
        "after": after,
        "worse": worsened(before, after) if before else [],
        **({"teacher": teacher} if teacher else {}),
        "parameters": parameters,
        **({"teachers": 1 + len(run.others)} if run.others else {}),
        "notes": handed_on_notes(run),
        **({} if recipe.run.lean else {"speed": measure_speed(run)}),
        "peak_memory_bytes": peak,
        "peak_memory_of": cost.peak_of,
        "world_size": ranks.world_size,
        "seconds": seconds,
        **({} if profile is None else {"profile": profile}),
    }


def _evaluations(
    folder: RunFolder, exported: int
) -> tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any] | None]:
    """Evaluations before the first step, where there is one, of the student of step `exported`, and
    of the teacher, where there is one.

    Raises:
        UserError: that of the student is missing, which another one can't stand for.
    """
    # those of the training may be gigabytes
    lines = [line for line in folder.each_metric() if line["kind"] != "train"]
    heldout = {line["step"]: evaluation_of(line) for line in lines if line["kind"] == "heldout"}
    teacher = [evaluation_of(line) for line in lines if line["kind"] == "teacher"]
    if exported not in heldout:
        raise UserError(
            f"{folder.metrics}: the evaluation of step {exported} is missing, whose student is "
            "handed on; put that line back and continue with --resume, or begin the run again"
        )
    return heldout.get(0), heldout[exported], teacher[0] if teacher else None


def disk_bytes(run: Run, folder: RunFolder) -> dict[str, int]:
    """Bytes of the files of a run's models that are read of them; the student is exported."""
    found = {"student": model_bytes(ModelSource(str(folder.student)))}
    if not isinstance(run.teacher, NoTeacher):
        found["teacher"] = model_bytes(run.source)
    return found


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
    return found + worsened_scores(before, after)


def worsened_scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """As `worsened`, of what doesn't depend on the losses."""
    found = []
    if after.get("score", 0.0) < before.get("score", 0.0):
        found.append(f"score {after['score']:.4f}, before {before['score']:.4f}")
    given, left = ({**x, **x.get("agreement", {})} for x in (before, after))
    for name, larger in _LARGER_IS_BETTER.items():
        value, was = left.get(name), given.get(name)
        if value is None or was is None:
            continue
        if (was - value if larger else value - was) > _NOISE * abs(was):
            form = ".4f" if larger else ".4g"
            found.append(f"{name.replace('_', ' ')} {value:{form}}, before {was:{form}}")
    for section in ("pairs", "mteb"):
        for name, value in after.get(section, {}).items():
            # the evaluations of a run name the same
            was = before[section][name]
            if value < was:
                found.append(f"{name} {value:.4f}, before {was:.4f}")
    return found


def judged_parts(judged: Mapping[str, Any]) -> list[str]:
    """What a evaluator said, for a line of a log."""
    cosine = judged.get("sentence_cosine")
    parts = [] if cosine is None else [f"cosine {cosine:.4f}"]
    for name, value in judged.get("agreement", {}).items():
        parts.append(f"{name.replace('_', ' ')} {value:.4f}")
    return parts + score_parts(judged)
