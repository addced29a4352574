"""What runs are scored on, and what a study may choose by: never what it reports."""

from __future__ import annotations

from fastkd.errors import UserError
from fastkd.recipe import AnyRecipe, each_stage

# of a task, what decides on which examples both models are scored, and by which number
_SCORED = ("name", "source", "kind", "evaluate", "metrics")


def scores_selection(recipe: AnyRecipe) -> bool:
    """Whether a run is scored on examples that are kept to choose by."""
    # the last stage makes the student that is scored
    return _is_kept_apart(each_stage(recipe)[-1])


def check_choice(recipe: AnyRecipe, where: str, whose: str, *, search: bool = False) -> None:
    """Refuse to choose by examples that are reported.

    Args:
        recipe: of a run or of a shared step.
        where: stands before the complaint.
        whose: says which examples these are.
        search: whether what the last stage reaches is searched by.

    Raises:
        UserError: naming the field that chooses.
    """
    stages = each_stage(recipe)
    for number, stage in enumerate(stages, start=1):
        if stage.task is None or _is_kept_apart(stage):
            continue
        place = f"stages.{number}." if len(stages) > 1 else ""
        chooses = {
            "search": search and stage is stages[-1],
            f"{place}train.early_stopping": stage.train.early_stopping is not None,
            "run.keep_best": stage.run.keep_best is not None,
        }
        for field, given in chooses.items():
            if given:
                raise UserError(
                    f"{where}: {field} chooses by the examples that {whose}; set task.selection, "
                    "whose share of the training examples is scored in their place, or leave "
                    f"{field} out"
                )


def scored_set(recipe: AnyRecipe) -> dict[str, object]:
    """What decides on which examples of its task a run is scored, by field; empty of text."""
    task = each_stage(recipe)[-1].task
    if task is None:
        return {}
    found: dict[str, object] = {f"task.{name}": getattr(task, name, None) for name in _SCORED}
    scored = task.selection if task.selection is not None and task.selection.scored else None
    found["task.selection.scored"] = scored is not None
    if scored is not None:
        found |= {"task.selection.share": scored.share, "task.train": task.train}
    return found


def check_alike(one: AnyRecipe, other: AnyRecipe, where: str, against: str) -> None:
    """Refuse two conditions of a task that are scored on different examples.

    Raises:
        UserError: naming the field in which they differ.
    """
    mine, theirs = scored_set(one), scored_set(other)
    for field in dict.fromkeys((*theirs, *mine)):
        if mine.get(field) != theirs.get(field):
            raise UserError(
                f"{where}: {field} makes it scored on other examples than {against}, so they can't "
                "be compared; give both the same"
            )


def _is_kept_apart(stage: AnyRecipe) -> bool:
    selection = None if stage.task is None else stage.task.selection
    return selection is not None and selection.scored
