"""Stages of a run: one recipe after the other, each starting from the student before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastkd.errors import UserError
from fastkd.recipe.merge import Tree, laid_over
from fastkd.seeds import derived_seed

MAY_DIFFER = ("losses", "layer_map", "train", "task")
"""Sections that a stage may give."""

# of each pair a stage that gives one replaces the other
_RIVALS = (("train", "steps", "epochs"), ("train", "warmup_steps", "warmup_share"))
# replaced whole: the terms of a stage are a set of their own
_WHOLE = ("losses", "layer_map")


def stage_trees(tree: Mapping[str, Any]) -> list[Tree]:
    """The recipe of each stage of a recipe, in order, as mappings.

    A stage's `losses` and `layer_map` take the place of the recipe's, its other sections are laid
    over them key by key. Stages write to `stage-1`, `stage-2`... of `run.output`. A later stage
    that gives no seed reads its data in an order of its own, and draws masks and dropout of its
    own: else a short one would read what the one before it read.

    Args:
        tree: of the whole recipe, its preset written out.

    Raises:
        UserError: a stage that sets what all stages share.
    """
    output = tree["run"]["output"]
    found = []
    for number, stage in enumerate(tree["stages"], start=1):
        for key in stage:
            if key not in MAY_DIFFER:
                raise UserError(
                    f"stages.{number}.{key}: all stages share this; expected some of "
                    f"{', '.join(MAY_DIFFER)}"
                )
        base = {key: value for key, value in tree.items() if key != "stages"}
        made = laid_over(base, _without_rivals(stage), _WHOLE)
        made["run"] = {**made["run"], "output": f"{output}/stage-{number}"}
        if number > 1:
            made["train"] = _drawing_apart(made.get("train", {}), stage.get("train", {}), number)
            init = f"{output}/stage-{number - 1}/student"
            made["student"] = {**made["student"], "init": init}
        found.append(made)
    return found


def _drawing_apart(train: Any, given: Any, number: int) -> Any:
    """A stage's section `train` with seeds of its own, but for those that it gave itself."""
    # what is no section, or no seed, is refused where the recipe is read
    if not isinstance(train, Mapping) or not isinstance(given, Mapping):
        return train
    found = dict(train)
    for name in ("order_seed", "dropout_seed"):
        shared = train.get(name)
        shared = train.get("seed", 0) if shared is None else shared
        if name not in given and "seed" not in given and isinstance(shared, int):
            found[name] = derived_seed(shared, number) % (1 << 31)
    return found


def _without_rivals(stage: Mapping[str, Any]) -> Tree:
    full = dict(stage)
    for section, one, other in _RIVALS:
        given = full.get(section)
        if isinstance(given, Mapping):
            for mine, rival in ((one, other), (other, one)):
                if mine in given and rival not in given:
                    given = {**given, rival: None if rival == "epochs" else 0}
            full[section] = given
    return full
