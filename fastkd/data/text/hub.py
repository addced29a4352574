"""Documents from a column of a table: Parquet files, saved folders and the hub, by `datasets`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from fastkd.data.text.files import (
    TEXT_COLUMN,
    Records,
    file_digest,
    require_columns,
)
from fastkd.data.text.parquet import ParquetRows
from fastkd.errors import FOREIGN_ERRORS, UserError

# what `datasets` and Arrow raise over files that are not what they seem
_READING_ERRORS = (
    *FOREIGN_ERRORS,
    OSError,
    # a damaged length
    MemoryError,
    DatasetsError,
)
_BATCH = 256
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Table(Records):
    """Rows of a `datasets.Dataset`, an `IterableDataset` or a Parquet file.

    The digest covers `key` and `files`.
    """

    name: str
    rows: Any
    column: str
    key: str = ""
    files: tuple[Path, ...] = ()

    def records(
        self, columns: Sequence[str], field: str = TEXT_COLUMN
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        rows = self.rows
        # a streamed hub data set may not know its columns before its first row
        if rows.column_names is not None:
            require_columns(columns, rows.column_names, self.name, field)
            rows = rows.select_columns([*columns])
        number = 0
        try:
            for batch in rows.iter(batch_size=_BATCH):
                require_columns(columns, list(batch), self.name, field)
                for values in zip(*(batch[column] for column in columns), strict=True):
                    number += 1
                    yield f"{self.name}, row {number}", dict(zip(columns, values, strict=True))
        except UserError:
            raise
        except _READING_ERRORS as error:
            raise UserError(f"{self.name}: cannot be read: {_reason(error)}") from error

    def feature(self, column: str) -> Any:
        """Type of a column, as `datasets` has it.

        Raises:
            UserError: it has none for the column.
        """
        try:
            return self.rows.select_columns([column]).features[column]
        except _READING_ERRORS as error:
            raise UserError(f"{self.name}: column {column!r}: {_reason(error)}") from error

    def digest(self, *, quick: bool) -> str:
        content = [file_digest(file, quick=quick) for file in self.files]
        combined = hashlib.sha256(" ".join(content).encode()).hexdigest()
        return f"table {self.column} {self.key} {combined}"

    def called(self) -> str:
        return self.name

    def stored_in(self) -> Sequence[Path]:
        return self.files


def parquet_file(path: Path, column: str) -> Table:
    """Rows of a Parquet file, read in batches; it may have none."""
    try:
        rows = ParquetRows.of(path)
    except _READING_ERRORS as error:
        raise UserError(f"{path}: cannot be read as Parquet: {_reason(error)}") from error
    return Table(str(path), rows, column, files=(path,))


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_folder(
    folder: Path,
    split: str,
    column: str,
    field: str = "data.split",
    *,
    any_split: bool = False,
) -> Table:
    """Rows of a folder that `datasets.save_to_disk` wrote, memory-mapped.

    Args:
        folder: of one data set, or of several by their splits.
        split: that is read; of one data set the one that it was saved as, where it has a name.
        column: of the documents.
        field: of the recipe, that names the split.
        any_split: whether one data set may be of another split, too.

    Raises:
        UserError: it has another split, or is damaged.
    """
    try:
        listing = folder / "dataset_dict.json"
        if listing.is_file():
            splits = json.loads(listing.read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise UserError(f"{folder}: no split {split!r}; set {field} to one of {splits}")
            folder = folder / split
        elif not any_split:
            _check_split(folder, split, field)
        # a format would make tensors of the cells, or leave columns out
        rows = _load_saved(folder).with_format(None)
    except UserError:
        raise
    except _READING_ERRORS as error:
        raise UserError(f"{folder}: not a complete saved data set: {_reason(error)}") from error
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return Table(str(folder), rows, column, files=files)


def _check_split(folder: Path, split: str, field: str) -> None:
    """Refuse one data set that was saved as another split than the one that is asked for."""
    saved = _state(folder)["_split"]
    if saved is None or saved == split:
        return
    # train[:10%]+train[50%:] is of train
    if {part.partition("[")[0] for part in saved.split("+")} != {split}:
        raise UserError(
            f"{folder}: it holds the split {saved!r} alone, and {split!r} is asked for; set "
            f"{field} to {saved!r}, or give the folder of {split!r}"
        )


def _state(folder: Path) -> dict[str, Any]:
    """What `datasets` wrote about the rows of a folder."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return state


def _load_saved(folder: Path) -> Any:
    if _state(folder)["_data_files"]:
        return datasets.load_from_disk(str(folder))
    # one without rows has no file, which `datasets` doesn't expect
    info = datasets.DatasetInfo.from_directory(str(folder))
    return datasets.Dataset.from_dict({name: [] for name in info.features})


def is_hub_name(name: str) -> bool:
    """Whether a hub data set could have this name (`NAME` or `NAME:SUBSET`)."""
    return _HUB_NAME.fullmatch(name) is not None


def hub_table(
    name: str, split: str, column: str, cache: Path, *, streaming: bool, field: str = "data"
) -> Table:
    """Rows of a data set of the hub, which `field` of the recipe names; code that it may carry is
    never run.

    Raises:
        UserError: it can't be loaded, or `datasets` would take the name for files of this machine.
    """
    path, _, subset = name.partition(":")
    if path in _PACKAGED_DATASETS_MODULES:
        raise UserError(
            f"{field}: {name!r} is no file or folder here, and as a hub name `datasets` takes "
            f"{path!r} for its reader of all files below {Path.cwd()}; give a path, or OWNER/NAME"
        )
    if Path(path).is_dir():
        raise UserError(
            f"{field}: {name!r} names a subset of a hub data set, but {path!r} is a folder here; "
            "give the path of what is to be read, or OWNER/NAME of the hub"
        )
    try:
        rows = datasets.load_dataset(
            path,
            subset or None,
            split=split,
            streaming=streaming,
            cache_dir=str(cache / "datasets"),
        )
    except _READING_ERRORS as error:
        raise UserError(
            f"{field}: {name!r} is no file or folder here, and as a hub data set it cannot be "
            f"loaded: {_reason(error)}"
        ) from error
    # the fingerprint of a loaded data set stands for its revision; a stream has only its name
    key = f"{name} {split}" if streaming else f"{name} {split} {rows._fingerprint}"
    return Table(name, rows, column, key=key)


def _reason(error: BaseException) -> str:
    """The first line of the innermost message, which is the one that says what happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
