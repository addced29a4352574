"""Losses and layer maps from outside: modules that register themselves when they are imported.

A recipe names them (`plugins: [my_losses]`), or an installed package does, by entry points of the
group `fastkd.plugins`. Only what Python can import anyway is imported: no file of a recipe or of a
run is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastkd.errors import FOREIGN_ERRORS, UserError, one_line

GROUP = "fastkd.plugins"
# what a module may raise while it is imported
_ERRORS = (*FOREIGN_ERRORS, NameError, OSError, SyntaxError, SystemExit)
# of torch, by name: what reads recipes loads no torch
_OF_THE_DEVICE = ("OutOfMemoryError", "AcceleratorError")


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


def source_digest(registered: Any) -> str | None:
    """sha256 of the file of a class's or function's module; `None` where it has none."""
    file = getattr(sys.modules.get(registered.__module__), "__file__", None)
    if file is None or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@contextlib.contextmanager
def plugin_errors(where: str, registered: Any) -> Iterator[None]:
    """Let what a plugin's class or function raises be one line: which fails, where, and why.

    Args:
        where: what it is in a recipe, as `losses.NAME`.
        registered: the class or function. What fastkd has itself raises what it raises, and so
            does a device that is full or broken.

    Raises:
        UserError: with the last line of the plugin's file that the error came through.
    """
    try:
        yield
    except FOREIGN_ERRORS as error:
        module = registered.__module__
        ours = module.split(".")[0] == "fastkd"
        if ours or isinstance(error, UserError) or type(error).__name__ in _OF_THE_DEVICE:
            raise
        file = getattr(sys.modules.get(module), "__file__", None)
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {lines[-1]} of {file}" if lines else ""
        said = f"{type(error).__name__}: {one_line(error)}{line}"
        raise UserError(f"{where}: {place_of(registered)} fails ({said})") from error


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
        remedy = "install it, or put the folder of its file on PYTHONPATH"
        if name.endswith(".py"):
            remedy = f"name the module, {name.removesuffix('.py')}, not its file"
        raise UserError(
            f"plugins: {name} can't be imported, as there is no module {error.name}; {remedy}"
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


def _refusal(where: str, error: BaseException, remedy: str = "") -> UserError:
    if isinstance(error, UserError):
        return UserError(f"{where}: {error}")
    said = f"{type(error).__name__}: {one_line(error)}"
    return UserError(f"{where} fails when it is imported ({said}){remedy}")
