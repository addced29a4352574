"""The seeds of a study's runs: what varies has the run's own, everything else the first one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from fastkd.errors import UserError
from fastkd.recipe import replace_value
from fastkd.recipe.presets import expand
from fastkd.study.spec import SEED, SEEDS


def check_free(tree: Mapping[str, Any], where: str) -> None:
    """Refuse a recipe that fixes what the seeds of a study drive.

    Args:
        tree: the recipe, before it gets seeds; `train.seed` is replaced, so it may be there.
        where: stands before the complaint.

    Raises:
        UserError: naming the seed.
    """
    for key, what in _fixed(tree):
        raise UserError(
            f"{where}: {key} is set by seeds; leave it out of the recipe, and {what} out of vary "
            "where it should not differ"
        )


def set_seeds(tree: dict[str, Any], seeds: Mapping[str, int]) -> None:
    """Give a recipe, in place, the seed of each thing that may vary."""
    replace_value(tree, SEED, seeds["weights"])
    # the others follow it where nothing else is said
    apart = {what for what, seed in seeds.items() if seed != seeds["weights"]}
    for what in apart & {"order", "dropout"}:
        replace_value(tree, SEEDS[what], seeds[what])
    if "maps" not in apart:
        return
    # an unknown preset is refused where the recipe is read
    with suppress(UserError):
        tree.update(expand(tree))
    for _, holder in _map_holders(tree):
        mapped = _as_section(holder.get("layer_map"))
        if mapped.get("kind") == "random":
            holder["layer_map"] = {**mapped, "seed": seeds["maps"]}


def _fixed(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The seeds that a recipe fixes, each with what it drives."""
    for place, part in _parts(tree):
        train = part.get("train")
        for what in ("weights", "order", "dropout"):
            key = SEEDS[what]
            # of the whole recipe it is the study's
            given = train.get(key.partition(".")[2]) if isinstance(train, Mapping) else None
            if given is not None and (place or key != SEED):
                yield f"{place}{key}", what
    for place, holder in _map_holders(tree):
        if _as_section(holder.get("layer_map")).get("seed") is not None:
            yield f"{place}{SEEDS['maps']}", "maps"


def _parts(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A recipe and its stages, each with what stands before its keys."""
    yield "", tree
    stages = tree.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else [], start=1):
        if isinstance(stage, dict):
            yield f"stages.{number}.", stage


def _map_holders(tree: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may have a `layer_map`, each with what stands before its keys: a recipe, its stages, and
    the terms of each."""
    for place, part in _parts(tree):
        yield place, part
        losses = part.get("losses")
        for name, term in losses.items() if isinstance(losses, dict) else ():
            if isinstance(term, dict):
                yield f"{place}losses.{name}.", term


def _as_section(layer_map: Any) -> Mapping[str, Any]:
    return layer_map if isinstance(layer_map, Mapping) else {"kind": layer_map}
