"""From the names in a recipe to sources of documents."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastkd.data.text.delimited import Delimited
from fastkd.data.text.files import (
    JsonLines,
    PythonDocs,
    Source,
    TextFile,
)
from fastkd.data.text.hub import (
    hub_table,
    is_hub_name,
    is_saved,
    parquet_file,
    saved_folder,
)
from fastkd.data.text.readers import KNOWN, by_name, by_suffix, registered_suffixes
from fastkd.data.text.settings import TextSettings
from fastkd.errors import UserError


def resolve(names: Iterable[str], data: TextSettings) -> list[Source]:
    """The sources behind the names, in the order given; files of a glob or folder by name."""
    return [source for name in names for source in _resolve_one(name, data)]


def is_here(name: str) -> bool:
    """Whether a name is one of files of this machine, there or not, and not one of elsewhere."""
    path = Path(name).expanduser()
    return path.exists() or glob.has_magic(name) or _looks_like_path(name)


def _resolve_one(name: str, data: TextSettings) -> Iterator[Source]:
    if name == "python-docs":
        yield PythonDocs()
        return
    path = Path(name).expanduser()
    registered = by_name(name)
    if registered is not None:
        yield registered
    elif path.is_file():
        yield _open_file(path, data)
    elif path.is_dir() and is_saved(path):
        yield saved_folder(path, data.split, data.text_column)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if _has_extension(file) and file.is_file())
        if not files:
            raise UserError(f"data: folder {name!r} holds no {_accepted()} and no saved data set")
        yield from (_open_file(file, data) for file in files)
    elif glob.has_magic(name):
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(f"data: no file matches {name!r} (from {Path.cwd()})")
        yield from (_open_file(file, data) for file in files)
    elif _looks_like_path(name) or not is_hub_name(name):
        raise UserError(f"data: no file or folder {name!r} (from {Path.cwd()})")
    else:
        yield hub_table(
            name, data.split, data.text_column, data.cache_root, streaming=data.streaming
        )


def _open_file(path: Path, data: TextSettings) -> Source:
    name = path.name.lower()
    if name.endswith((".txt", ".txt.gz")):
        return TextFile(path, data.documents)
    if name.endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz")):
        return Delimited(path, data.text_column)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return JsonLines(path, data.text_column)
    if name.endswith(".parquet"):
        return parquet_file(path, data.text_column)
    registered = by_suffix(path)
    if registered is not None:
        return registered
    raise UserError(f"data: cannot tell the format of {str(path)!r}; expected {_accepted()}")


def _extensions() -> tuple[str, ...]:
    return (*KNOWN, *registered_suffixes())


def _has_extension(path: Path) -> bool:
    return path.name.lower().endswith(_extensions())


def _looks_like_path(name: str) -> bool:
    common = (".json", ".gz", ".zip", ".zst", ".bz2", ".xz", ".md")
    return name.startswith(("/", ".", "~")) or name.lower().endswith((*_extensions(), *common))


def _accepted() -> str:
    return ", ".join(_extensions())
