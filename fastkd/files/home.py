"""Paths in a home folder, which not every user has: a container may run as a bare number."""

from __future__ import annotations

import os
from pathlib import Path

from fastkd.errors import UserError


def at_home(path: str | Path, field: str) -> Path:
    """A path with the home folder in place of `~`, where it begins so.

    Args:
        path: as a recipe gives it.
        field: of the recipe, for the message.

    Raises:
        UserError: nobody knows where that is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{field} is {path}, but there is no home folder: HOME is not set, and user "
            f"{os.getuid()} is not known here; give {field} another folder, or set HOME"
        ) from error


def home_or_none() -> Path | None:
    """The home folder of this user, where one is known."""
    try:
        return Path.home()
    except RuntimeError:
        return None
