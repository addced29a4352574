"""What stands in a run's folder, and what a run that was killed as it began leaves there."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from fastkd.files.disk import is_temporary
from fastkd.files.lock import LOCK

FILES = (
    "recipe.yaml",
    "environment.json",
    "models.json",
    "metrics.jsonl",
    "predictions.npz",
    "projections.safetensors",
    "summary.json",
    "report.html",
)
"""Names of a run's own files."""

STAGE = re.compile(r"stage-\d+")
"""Names of the folders of a run's stages."""

FOLDERS = re.compile(rf"checkpoints|student|tensorboard|{STAGE.pattern}")
"""Names of its folders."""


def holds_beginnings(folder: Path) -> bool:
    """Whether there is nothing but what runs make before their recipe stands there."""
    return all(_is_beginning(path) for path in folder.iterdir())


def _is_beginning(path: Path) -> bool:
    kind = kind_of(path)
    if kind == "folder":
        if path.name == "tensorboard":
            return all(found.name.startswith("events.out.tfevents.") for found in path.iterdir())
        return STAGE.fullmatch(path.name) is not None and holds_beginnings(path)
    return kind == "file" and (path.name == LOCK or is_temporary(path, *FILES))


def kind_of(path: Path) -> str:
    """What stands at a path, in a word: `file`, `folder`, `link`, `special file`."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "link"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "special file"
