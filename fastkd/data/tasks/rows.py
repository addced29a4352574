"""Rows of a task's files and tables: the cells that a task reads, and where each row stands.

TSV is split at every TAB: the official files hold unbalanced quotes, so a reader that knows about
quotes would join rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel

from fastkd.data.tasks.labels import (
    are_numbers,
    described,
    is_generic,
    order_of,
)
from fastkd.data.tasks.task import Columns, Task
from fastkd.data.text.delimited import Delimited, unquoted
from fastkd.data.text.files import JsonLines, Records, require_once, text_lines
from fastkd.data.text.hub import Table
from fastkd.errors import UserError


class Row(NamedTuple):
    """One example as it is stored; `problem` says why the row has no cells."""

    where: str
    texts: tuple[object, ...]
    label: object
    problem: str | None = None


def tsv_rows(
    path: Path, columns: Columns, header: Sequence[str] | None, *, official: bool = False
) -> Iterator[Row]:
    """Rows of a TSV file.

    Args:
        path: UTF-8, plain or gzipped.
        columns: that are read.
        header: the file's columns, if its first line does not name them.
        official: whether its quotes are known to be the texts' own, however they look.

    Raises:
        UserError: the file can't be read, lacks a column, or looks quoted.
    """
    lines = enumerate(text_lines(path), start=1)
    if header is None:
        names = next(lines, (0, ""))[1].split("\t")
        _require(columns, names, f"{path}, line 1")
    else:
        names = list(header)
    places = [names.index(name) for name in columns.texts]
    label = names.index(columns.label)
    rows = ((number, line.split("\t")) for number, line in lines)
    for number, cells in rows if official else unquoted(path, rows):
        where = f"{path}, line {number}"
        if len(cells) == len(names):
            yield Row(where, tuple(cells[place] for place in places), cells[label])
        else:
            found = f"{len(cells)} columns" if "".join(cells).strip() else "an empty line"
            yield Row(where, (), None, f"{found}, expected {len(names)} split by TAB")


def record_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a CSV file, or of one with one JSON object a line.

    Raises:
        UserError: the file can't be read, or a row lacks a column.
    """
    read = JsonLines if path.name.removesuffix(".gz").endswith(".jsonl") else Delimited
    source: Records = read(path, columns.label)
    for where, row in source.records((*columns.texts, columns.label), "task.columns"):
        yield Row(where, tuple(row[name] for name in columns.texts), row[columns.label])


def table_rows(table: Table, columns: Columns, task: Task) -> Iterator[Row]:
    """Rows of a table whose columns have types; classes come as the task spells them.

    Args:
        table: of `datasets` or a Parquet file.
        columns: that are read.
        task: that is read. A class of the table is found by its name, and by its number where the
            task's labels are numbers without a meaning or the table's names are.

    Raises:
        UserError: the table lacks a column, has other classes, or can't be read.
    """
    name = table.name
    _require(columns, table.rows.column_names, name)
    feature = table.feature(columns.label)
    listed = getattr(feature, "feature", None)
    feature = feature if listed is None else listed
    spelled: list[str] | None = None
    if isinstance(feature, ClassLabel):
        spelled = _spelled(feature.names, task)
        if spelled is None:
            raise UserError(
                f"{name}: column {columns.label!r} has the classes {', '.join(feature.names)}, "
                f"expected {described(task) or 'scores'}"
            )
    for where, row in table.records([*columns.texts, columns.label]):
        label = row[columns.label]
        if spelled is not None and label is not None:
            named = partial(_label, spelled=spelled, place=f"{where}: column {columns.label!r}")
            label = named(label) if listed is None else [named(number) for number in label]
        yield Row(where, tuple(row[name] for name in columns.texts), label)


def spelling_of(label: object) -> str:
    """How a file would spell a class that a cell holds: numbers are classes, too."""
    if isinstance(label, str | Decimal):
        return str(label)
    return json.dumps(label, default=repr)


def _label(number: int | None, spelled: Sequence[str], place: str) -> str | None:
    if number is None or 0 <= number < len(spelled):
        return None if number is None else spelled[number]
    # the hub marks rows without a label, those of test sets, by -1
    given = "-1, which stands for no label" if number == -1 else f"class {number}"
    raise UserError(
        f"{place} holds {given}, expected a number from 0 to {len(spelled) - 1}; give a split "
        "with labels, or remove such rows"
    )


def _spelled(names: Sequence[str], task: Task) -> list[str] | None:
    """The classes of a table as the task spells them; `None` where they are not the task's."""
    order = order_of(names, task)
    if order is not None:
        return [task.labels[order.index(number)] for number in range(len(names))]
    if len(names) != len(task.labels):
        return None
    if are_numbers(task) and not task.meanings:
        # what the table stores is what the task calls them
        return [str(number) for number in range(len(names))]
    return list(task.labels) if is_generic(names) else None


def _require(columns: Columns, names: Sequence[str], where: str) -> None:
    require_once((*columns.texts, columns.label), names, where)
    missing = [name for name in (*columns.texts, columns.label) if name not in names]
    if missing:
        raise UserError(
            f"{where}: no column {missing[0]!r}; it has {', '.join(map(repr, names)) or 'none'}, "
            f"expected {', '.join(map(repr, (*columns.texts, columns.label)))}"
        )
