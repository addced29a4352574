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


def resolve(
    names: Iterable[str],
    data: TextSettings,
    *,
    heldout: bool = False,
    split_field: str = "data.split",
) -> list[Source]:
    """The sources behind the names, in the order given; files of a glob or folder by name.

    Args:
        names: as a recipe gives them.
        data: how they are read.
        heldout: whether they are those of `data.heldout`, where the usual `data.split` is the one
            of the training text.
        split_field: of the recipe, that names the split.

    Raises:
        UserError: nothing is there, or what is can't be read.
    """
    any_split = heldout and data.split == TextSettings.split
    return [source for name in names for source in _resolve_one(name, data, any_split, split_field)]


def is_here(name: str) -> bool:
    """Whether a name is one of files of this machine, there or not, and not one of elsewhere."""
    path = Path(name).expanduser()
    return path.exists() or glob.has_magic(name) or _looks_like_path(name)


def _resolve_one(
    name: str, data: TextSettings, any_split: bool, split_field: str
) -> Iterator[Source]:
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
        yield saved_folder(path, data.split, data.text_column, split_field, any_split=any_split)
    elif path.is_dir():
        files = sorted(_files_below(path))
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


def _files_below(folder: Path) -> Iterator[Path]:
    """Files that can be read in a folder and its folders; hidden ones are left out, as by globs."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if _has_extension(file) and not hidden and file.is_file():
            yield file


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
