"""Losses and layer maps from outside: modules that register themselves when they are imported.

A recipe names them (`plugins: [my_losses]`), or an installed package does, by entry points of the
group `fastkd.plugins`. Only what Python can import anyway is imported: no file of a recipe or of a
run is.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

from fastkd.errors import FOREIGN_ERRORS, UserError, one_line

GROUP = "fastkd.plugins"
# what a module may raise while it is imported
_ERRORS = (*FOREIGN_ERRORS, NameError, OSError, SyntaxError)


def load_plugins(names: object = ()) -> None:
    """Import the plugins of installed packages, then those of a recipe; each once.

    Args:
        names: what a recipe has under `plugins`, not yet validated; what is no list of names is
            left to the validation.

    Raises:
        UserError: naming the plugin that can't be imported or registers what it can't, and why.
    """
    _load_installed()
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple):
        return
    for name in names:
        if isinstance(name, str) and is_module_name(name):
            _load(name)


def place_of(registered: Any) -> str:
    """Where a class or function from a plugin stands, for messages and to know it again: a module
    that is imported again brings the same one once more."""
    return f"{registered.__module__}.{registered.__qualname__}"


def is_module_name(name: str) -> bool:
    """Whether Python could import something of this name."""
    return all(part.isidentifier() for part in name.split("."))


def _load(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a plugin may miss a module of its own
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _refusal(f"plugins: {name}", error) from error
        raise UserError(
            f"plugins: {name} can't be imported, as there is no module {error.name}; install it, "
            "or put the folder of its file on PYTHONPATH"
        ) from error
    except _ERRORS as error:
        raise _refusal(f"plugins: {name}", error) from error


@functools.cache
def _load_installed() -> None:
    found = importlib.metadata.entry_points(group=GROUP)
    for entry in sorted(found, key=lambda entry: (entry.name, entry.value)):
        try:
            entry.load()
        except _ERRORS as error:
            package = "a package" if entry.dist is None else entry.dist.name
            where = f"plugin {entry.name} ({entry.value}) of {package}"
            raise _refusal(where, error, "; mend or uninstall it") from error


def _refusal(where: str, error: Exception, remedy: str = "") -> UserError:
    if isinstance(error, UserError):
        return UserError(f"{where}: {error}")
    said = f"{type(error).__name__}: {one_line(error)}"
    return UserError(f"{where} fails when it is imported ({said}){remedy}")
