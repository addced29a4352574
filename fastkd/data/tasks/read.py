"""A split of a task, read and checked: texts with their classes or scores."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fastkd.data.tasks.glue import GLUE
from fastkd.data.tasks.rows import (
    Row,
    record_rows,
    spelling_of,
    table_rows,
    tsv_rows,
)
from fastkd.data.tasks.task import Task
from fastkd.data.text.files import checked_text, number_in
from fastkd.data.text.hub import (
    hub_table,
    is_hub_name,
    is_saved,
    parquet_file,
    saved_folder,
)
from fastkd.errors import UserError, some_of
from fastkd.files.home import at_home
from fastkd.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

ENDINGS = (".tsv", ".tsv.gz", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")
"""Endings of a split's file, of which there is one."""
BROKEN_SHARE = 0.001
"""Share of a split's rows that may at most be left out as broken."""


T = TypeVar("T")
FileReader = Callable[[Path], Iterator[Row]]
"""From a file to the rows of a task."""


class Example(NamedTuple):
    """One text or pair, and its class or score; or words and their classes."""

    texts: tuple[str, ...]
    label: Any


class ExampleSource(Protocol):
    """Examples in a fixed order, and a key of their content."""

    @property
    def regression(self) -> bool:
        """Whether labels are scores."""

    @property
    def digest(self) -> str:
        """sha256 that stands for every text and label."""

    def __iter__(self) -> Iterator[Example]: ...


@dataclass(frozen=True)
class Examples:
    """A split of a task, in the order of its file."""

    name: str
    """Task and split, for people."""
    texts: list[tuple[str, ...]]
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    """[examples] classes, int64, or scores, fp32."""

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Example]:
        return map(Example, self.texts, self.labels.tolist())

    @property
    def regression(self) -> bool:
        """Whether labels are scores."""
        return self.labels.dtype == np.float32

    @cached_property
    def digest(self) -> str:
        """Digest of the content, the same wherever the split was read from."""
        content = hashlib.sha256(self.labels.tobytes())
        for texts in self.texts:
            content.update(json.dumps(texts).encode())
        return content.hexdigest()


def read_examples(task: Task, source: str | Path, split: str, cache: str | Path) -> Examples:
    """Read a split of a task.

    Args:
        task: what it is.
        source: the folder that holds `SPLIT` with one of `ENDINGS`, or holds such folders by task
            names; a folder that `datasets.save_to_disk` wrote; or a hub data set that has the task
            as a configuration, such as `nyu-mll/glue`.
        split: `task.train` or one of `task.evaluations`.
        cache: folder for what the hub sends.

    Raises:
        UserError: with file and line: no such split, a missing column, a wrong number of columns,
            text that is empty or not UTF-8, a label that the task does not have.
    """

    def example(row: Row) -> Example:
        label = _score(row, task) if task.regression else _class(row, task)
        return Example(_texts(row, task), label)

    name, found = read_split(task, source, split, cache, example)
    labels = [label for _, label in found]
    scores = np.asarray(labels, np.float32) if task.regression else np.asarray(labels, np.int64)
    return Examples(name, [texts for texts, _ in found], scores)


def read_split(
    task: Task,
    source: str | Path,
    split: str,
    cache: str | Path,
    read: Callable[[Row], T],
    others: Mapping[str, FileReader] | None = None,
) -> tuple[str, list[T]]:
    """Task and split for people, and what every row of it is read as.

    Args:
        task: as `read_examples` takes it; so are `source`, `split` and `cache`.
        read: makes an example of a row, or refuses it.
        others: readers of files that this kind of task may come in, by their endings.

    Raises:
        UserError: as `read_examples`.
    """
    examples: list[T] = []
    broken: list[str] = []
    for row in _rows(task, source, split, at_home(cache, "task.cache"), others or {}):
        problem = row.problem or _empty(row)
        if problem is None:
            examples.append(read(row))
        elif task.skip_broken_rows:
            broken.append(f"{row.where}: {problem}")
        else:
            raise UserError(f"{row.where}: {problem}; mend or remove the row")
    name = f"{task.name} {split}"
    if not examples:
        raise UserError(f"{source}: {name} has no rows; give the file that holds them")
    if len(broken) > BROKEN_SHARE * len(examples) + 1:
        raise UserError(
            f"{broken[0]}, and {len(broken) - 1} more broken rows beside {len(examples)} whole "
            "ones; fetch the file again"
        )
    if broken:
        logger.warning("%s: %d broken rows left out; %s", name, len(broken), broken[0])
    return name, examples


def _rows(
    task: Task, source: str | Path, split: str, cache: Path, others: Mapping[str, FileReader]
) -> Iterator[Row]:
    folder = Path(source).expanduser()
    columns = task.hub_columns or task.columns
    stored = task.hub_splits.get(split, split)
    if folder.is_dir() and not is_saved(folder):
        folder = folder / task.name if (folder / task.name).is_dir() else folder
    if folder.is_dir() and is_saved(folder):
        table = saved_folder(folder, stored, columns.label, "task.train or task.evaluate")
        return table_rows(table, columns, task)
    if folder.is_dir():
        path = _split_file(folder, task, split, (*ENDINGS, *others))
        for ending, rows in others.items():
            if path.name.endswith(ending):
                return rows(path)
        if path.name.removesuffix(".gz").endswith((".csv", ".jsonl")):
            return record_rows(path, task.columns)
        if path.name.endswith(".parquet"):
            return table_rows(parquet_file(path, task.columns.label), task.columns, task)
        official = task in GLUE.values()
        return tsv_rows(path, task.columns, task.header, official=official)
    if folder.exists() or not is_hub_name(str(source)) or str(source).startswith((".", "~")):
        raise UserError(
            f"{source}: no folder (from {Path.cwd()}); expected one that holds {split}.tsv of "
            f"{task.name}, or a hub data set such as nyu-mll/glue"
        )
    name = f"{source}:{task.hub_name or task.name}"
    table = hub_table(name, stored, columns.label, cache, streaming=False, field="task.source")
    return table_rows(replace(table, name=f"{name} {stored}"), columns, task)


def _split_file(folder: Path, task: Task, split: str, endings: Sequence[str]) -> Path:
    found = [split + ending for ending in endings if (folder / (split + ending)).is_file()]
    if len(found) > 1:
        raise UserError(
            f"{folder}: {split} of {task.name} stands in {' and in '.join(found)}; expected one "
            "file, so take away what is not to be read"
        )
    if found:
        return folder / found[0]
    there = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    raise UserError(
        f"{folder}: no {split}.tsv of {task.name}; it holds {shown or 'nothing'}, expected "
        f"{split} with one of {', '.join(endings)}"
    )


def _empty(row: Row) -> str | None:
    for text in row.texts:
        if isinstance(text, str) and not text.strip():
            return "a text is empty, expected words"
    return None


def _texts(row: Row, task: Task) -> tuple[str, ...]:
    names = task.columns.texts
    return tuple(
        checked_text(text, name, row.where) for name, text in zip(names, row.texts, strict=True)
    )


def _class(row: Row, task: Task) -> int:
    label = spelling_of(row.label)
    if row.label is None or label not in task.numbers:
        raise UserError(
            f"{row.where}: label {label!r} of column {task.columns.label!r}, expected one of "
            f"{some_of(task.labels)}"
        )
    return task.numbers[label]


def _score(row: Row, task: Task) -> float:
    assert task.bounds is not None
    low, high = task.bounds
    score = number_in(row.label)
    if not low <= score <= high:
        raise UserError(
            f"{row.where}: score {row.label!r:.50} of column {task.columns.label!r}, expected a "
            f"number from {low:g} to {high:g}"
        )
    if score == IGNORE_INDEX:
        raise UserError(
            f"{row.where}: score {row.label!r} of column {task.columns.label!r} is what stands for "
            "no label; give scores on another scale"
        )
    return score
