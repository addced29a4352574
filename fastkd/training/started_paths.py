"""Relative paths of a recipe, as seen from the folder that its run was started from."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.recipe.models import STARTS

# fields that name files and folders, or something on the hub
PLACES = (
    "model.name",
    "teacher.model",
    "teacher.others.model",
    "student.init",
    "data.train",
    "data.heldout",
    "data.cache",
    "task.source",
    "task.cache",
    "task.augmentation.masked_model",
    "task.augmentation.glove",
    "task.augmentation.synonyms",
)


def found_from(tree: Mapping[str, Any], folder: Path, given: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe whose relative paths are absolute where something is there, seen from a folder; any
    other name is on the hub or nowhere. Keys in `given`, and what is below them, stay."""
    found = dict(tree)
    pairs = (tree.get("evaluate") or {}).get("pairs", ())
    for place in (*PLACES, *(f"evaluate.pairs.{name}.path" for name in pairs)):
        if not any(f"{place}.".startswith(f"{key}.") for key in given):
            found = _replaced(found, place, folder)
    if found.get("stages"):
        found["stages"] = [found_from(stage, folder) for stage in found["stages"]]
    return found


def _replaced(section: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    value = section.get(head)
    if rest and isinstance(value, dict):
        return {**section, head: _replaced(value, rest, folder)}
    if rest and isinstance(value, list):
        return {**section, head: [_replaced(one, rest, folder) for one in value]}
    if rest or not value:
        return section
    if isinstance(value, list):
        return {**section, head: [_absolute(name, folder) for name in value]}
    # words, which the recipe reads before it looks for a folder
    word = head == "init" and value in STARTS
    return section if word else {**section, head: _absolute(value, folder)}


def _absolute(name: str, folder: Path) -> str:
    if name == "python-docs" or name.startswith("~"):
        return name
    path = folder / name
    if os.path.lexists(path):
        # one file, one name; a link may point elsewhere tomorrow, so it keeps its own
        return str(path.resolve() if ".." in path.parts else path)
    pattern = f"{glob.escape(str(folder))}/{name}"
    return pattern if glob.has_magic(name) and glob.glob(pattern, recursive=True) else name
