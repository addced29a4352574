"""Losses and layer maps from outside: modules that register themselves when they are imported.

A recipe names them (`plugins: [my_losses]`), or an installed package does, by entry points of the
group `fastkd.plugins`. Only what Python can import anyway is imported: no file of a recipe or of a
run is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from fastkd.errors import Interrupted, LostRank, UserError, one_line
from fastkd.files.sealed import file_sha256

GROUP = "fastkd.plugins"
# of torch, by name: what reads recipes loads no torch
_OF_THE_MACHINE = {"OutOfMemoryError", "AcceleratorError", "DistError"}


def load_plugins(names: object = ()) -> None:
    """Import the plugins of installed packages, then those of a recipe; each once.

    Args:
        names: what a recipe has under `plugins`, not yet validated; what is no list of names is
            left to the validation.

    Raises:
        UserError: naming the plugin that can't be imported or registers what it can't, and why; or
            one whose file was edited after this process had imported it.
    """
    for where, name in _load_installed():
        _check_unedited(where, name)
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


@dataclass(frozen=True)
class _Source:
    """The file of a module as it was when the module was imported."""

    module: ModuleType
    spec: object
    """Another one once the module is reloaded."""
    file: Path
    digest: str

    @property
    def is_edited(self) -> bool:
        try:
            return file_sha256(self.file) != self.digest
        except OSError:
            return True


# by the names of modules
_sources: dict[str, _Source] = {}


def note_source(registered: Any) -> None:
    """Keep what the file of a class's or function's module holds: called while the module is
    imported, as later the file may hold other code than what runs."""
    _noted(registered.__module__)


def source_digest(registered: Any) -> str | None:
    """sha256 of the file of a class's or function's module, as it was imported; `None` where it has
    none."""
    source = _noted(registered.__module__)
    return None if source is None else source.digest


def _noted(name: str) -> _Source | None:
    module = sys.modules.get(name)
    if module is None:
        return None
    known, spec = _sources.get(name), getattr(module, "__spec__", None)
    if known is not None and known.module is module and known.spec is spec:
        return known
    _sources.pop(name, None)
    file = getattr(module, "__file__", None)
    if file is not None and Path(file).is_file():
        path = Path(file).absolute()
        _sources[name] = _Source(module, spec, path, file_sha256(path))
    return _sources.get(name)


@contextlib.contextmanager
def plugin_errors(
    where: str, registered: Any, *, agreed: type[Exception] | None = None, remedy: str = ""
) -> Iterator[None]:
    """Let what a plugin's class or function raises be one line: which fails, where, and why.

    Args:
        where: what it is in a recipe, as `losses.NAME`.
        registered: the class or function. What fastkd has itself raises what it raises, and so
            does a machine that is full or broken.
        agreed: what it is asked to raise, which passes.
        remedy: what else to do, behind all that.

    Raises:
        UserError: with the last line of the plugin's file that the error came through.
    """
    try:
        yield
    # code of others raises classes of its own and of any package: only what passes can be listed
    except Exception as error:
        passes = _is_no_fault(error) or (agreed is not None and isinstance(error, agreed))
        if passes or is_built_in(registered):
            raise
        file = getattr(sys.modules.get(registered.__module__), "__file__", None)
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {lines[-1]} of {file}" if lines else ""
        said = f"{_said(error)}{line}"
        raise UserError(f"{where}: {place_of(registered)} fails ({said}){remedy}") from error


def is_built_in(registered: Any) -> bool:
    """Whether a class or function is fastkd's own."""
    return str(registered.__module__).split(".")[0] == "fastkd"


def is_module_name(name: str) -> bool:
    """Whether Python could import something of this name."""
    return all(part.isidentifier() for part in name.split("."))


def _load(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a plugin may miss a module of its own
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            _refuse(f"plugins: {name}", error)
        remedy = "install it, or put the folder of its file on PYTHONPATH"
        if name.endswith(".py"):
            remedy = f"name the module, {name.removesuffix('.py')}, not its file"
        raise UserError(
            f"plugins: {name} can't be imported, as there is no module {error.name}; {remedy}"
        ) from error
    # as of plugin_errors; a module that exits must not end the command without a word
    except (Exception, SystemExit) as error:
        _refuse(f"plugins: {name}", error)
    _check_unedited(f"plugins: {name}", name)


def _check_unedited(where: str, name: str) -> None:
    """See that a plugin's code is what its files say, and those of the modules of its package.

    Raises:
        UserError: the first file that isn't: its old code would run without a word.
    """
    package = name.partition(".")[0]
    for each in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
        source = _noted(each)
        if source is not None and source.is_edited:
            raise UserError(
                f"{where}: {source.file} was changed after this process had imported it, and its "
                "old code would run; start the process (of a notebook, its kernel) again"
            )


@functools.cache
def _load_installed() -> tuple[tuple[str, str], ...]:
    """Import what installed packages bring; what messages call each of it, and its module."""
    loaded = []
    found = importlib.metadata.entry_points(group=GROUP)
    for entry in sorted(found, key=lambda entry: (entry.name, entry.value)):
        package = "a package" if entry.dist is None else entry.dist.name
        where = f"plugin {entry.name} ({entry.value}) of {package}"
        try:
            entry.load()
        # likewise
        except (Exception, SystemExit) as error:
            _refuse(where, error, "; mend or uninstall it")
        loaded.append((where, entry.value.partition(":")[0].strip()))
    return tuple(loaded)


def _refuse(where: str, error: BaseException, remedy: str = "") -> NoReturn:
    if isinstance(error, UserError):
        raise UserError(f"{where}: {error}") from error
    if _is_no_fault(error):
        raise error
    raise UserError(f"{where} fails when it is imported ({_said(error)}){remedy}") from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _is_no_fault(error: BaseException) -> bool:
    """Whether an error that came through a plugin says nothing of it: a refusal of fastkd, a stop,
    a lost rank, or a machine that is full or broken."""
    names = {kind.__name__ for kind in type(error).__mro__}
    ours = isinstance(error, UserError | Interrupted | LostRank | MemoryError)
    return ours or not names.isdisjoint(_OF_THE_MACHINE)
