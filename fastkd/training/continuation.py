"""What may differ between a run and its continuation, and when a run can be made longer.

A run that is continued ends exactly where one that was never stopped does, under the recipe that it
is continued with. That holds for what changes no weight; for the micro-batch, because results don't
depend on how a step is cut (up to rounding and the draws of dropout); and for the number of steps
where no step before depended on it. Learning rates that decay to the last step did, as did weights
of losses that move over the run: such a run can't be made longer, only gone on from by another one
that starts from its student. Where weights, moments and the teacher lie may change: a checkpoint
holds the state of training by the names of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastkd.recipe import AnyRecipe, Recipe, Schedule, each_stage, parse_any_recipe

# nothing here changes a weight, but for rounding and the draws of dropout
_FREE = frozenset(
    {
        "data.batch_tokens",
        "data.cache",
        "data.workers",
        "task.cache",
        "task.padding",
        "train.log_every",
        "train.evaluate_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.micro_batch_size",
        "train.zero_stage",
        "train.compile",
        "train.cuda_graph",
        "train.profile",
        "teacher.placement",
        "teacher.cache_folder",
        "teacher.cache_limit",
        "run.output",
        "run.monitor",
    }
)
_DECIDES = ("train.early_stopping.metric", "run.keep_best")
_ZERO = "deepspeed.zero_optimization"
# where ZeRO keeps things, and how much of them moves at once; other keys there change numbers
_MOVES = re.compile(
    rf"{re.escape(_ZERO)}\.(offload_(optimizer|param)(\..*)?|stage3_\w+|sub_group_size"
    r"|overlap_comm|contiguous_gradients|\w+_bucket_size)"
)
_LENGTHS = ("steps", "epochs")
# of these the recipe that a run is continued with is in force
_TAKEN_OVER = {
    "train": ("micro_batch_size", "zero_stage", "compile", "cuda_graph", "profile", *_LENGTHS),
    "teacher": ("placement", "cache_folder", "cache_limit"),
    "task": ("padding",),
    "data": ("batch_tokens",),
}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field in which a recipe can't be the continuation of another, and both values.

    Args:
        before: the recipe of the run, as a mapping, its files found.
        now: the recipe that it is continued with, likewise.
    """
    one, other = dict(flat(before)), dict(flat(now))
    # evaluations that decide change what a run comes to
    decided = any(_field(key) in _DECIDES and one[key] is not None for key in one)
    free = _FREE - {"train.evaluate_every"} if decided else _FREE
    for key in sorted(one.keys() | other.keys()):
        field = _field(key)
        may = field in free or field in [f"train.{name}" for name in _LENGTHS]
        may = may or _MOVES.fullmatch(field) is not None
        if not may and one.get(key) != other.get(key):
            return key, one.get(key), other.get(key)
    return None


def _field(key: str) -> str:
    """A field of a stage's recipe as that of any recipe."""
    return re.sub(r"^stages\.\d+\.", "", key)


def why_not_longer(before: AnyRecipe, now: AnyRecipe) -> str | None:
    """Why a run can't be continued to the length of a recipe; `None` where it can, or needn't."""
    ours, theirs = each_stage(before), each_stage(now)
    for number, (old, new) in enumerate(zip(ours, theirs, strict=True), start=1):
        for name in _LENGTHS:
            was, given = getattr(old.train, name), getattr(new.train, name)
            if was == given:
                continue
            field = f"train.{name}" if len(ours) == 1 else f"stages.{number}.train.{name}"
            said = f"was started with {field}={was!r}, now {given!r} is given"
            if number < len(ours):
                return f"{said}, but only the last stage can be made longer"
            if not was or not given or given < was:
                return f"{said}; a run can only be made longer, in the same unit"
            reason = _depends_on_length(new)
            if reason is not None:
                return f"{said}, but {reason}"
    return None


def longer(before: AnyRecipe, now: AnyRecipe) -> str | None:
    """What a recipe makes longer about a run, and what that does to the learning rate."""
    old, new = each_stage(before)[-1].train, each_stage(now)[-1].train
    for name in _LENGTHS:
        was, given = getattr(old, name), getattr(new, name)
        if was != given:
            return (
                f"made longer: train.{name} was {was:g}, now {given:g}; the learning rate stays at "
                f"{new.learning_rate:g}, as train.schedule is constant"
            )
    return None


def in_force(before: AnyRecipe, now: AnyRecipe) -> AnyRecipe:
    """The recipe of a run with the length, the micro-batch and the layout of the one that it is
    continued with."""
    tree, given = before.model_dump(mode="json"), now.model_dump(mode="json")
    stages = zip(tree.get("stages", ()), given.get("stages", ()), strict=True)
    for old, new in ((tree, given), *stages):
        for section, fields in _TAKEN_OVER.items():
            there, said = old.get(section) or {}, new.get(section) or {}
            kept = {k: v for k, v in there.items() if k not in fields}
            taken = {k: v for k, v in said.items() if k in fields}
            if kept or taken:
                old[section] = {**kept, **taken}
    # nothing else of this section may differ
    tree["deepspeed"] = given["deepspeed"]
    return parse_any_recipe(tree)


def from_its_student(recipe: AnyRecipe) -> str:
    """What is left to do with a run that can't be made longer."""
    field = "student.init" if isinstance(recipe, Recipe) else "model"
    return f"go on from its student in another run, with {field}"


def _depends_on_length(recipe: AnyRecipe) -> str | None:
    instead = f"; {from_its_student(recipe)}"
    train = recipe.train
    if train.schedule != "constant":
        return (
            f"with train.schedule {train.schedule} the learning rates of the steps that were made "
            f"depend on it, so only a constant one can be made longer{instead}"
        )
    if train.warmup_share:
        return f"train.warmup_share is {train.warmup_share:g}, a share of all steps{instead}"
    terms = recipe.losses.terms if isinstance(recipe, Recipe) else {}
    for name, term in terms.items():
        for field, value in term:
            if isinstance(value, Schedule):
                return f"losses.{name}.{field} is stretched over all steps{instead}"
    return None


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a recipe, a mapping, by its dotted key; stages are counted from 1."""
    for key, value in tree.items():
        if key == "stages" and not prefix:
            for number, stage in enumerate(value, start=1):
                yield from flat(stage, f"stages.{number}.")
            yield "stages", len(value)
        elif isinstance(value, dict) and (value or f"{prefix}{key}.".startswith("deepspeed.")):
            # an empty section of DeepSpeed's says what a missing one does
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
