"""Which columns of a table hold the texts that a first recipe reads, told from its first rows.

Texts differ from row to row and have several words; labels, sources and licences don't. What is
left out is named in the recipe, with the reason.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, NoReturn

from fastkd.data.text.files import Records, checked_text, is_conversation, number_in
from fastkd.data.text.hub import Table
from fastkd.errors import UserError, printable, some_of
from fastkd.recipe.yaml_text import quoted

_ROWS = 500
# of a column of texts in the mean, so that names of sources, one word each, are none
_FEWEST_WORDS = 1.5
# of its cells, so that no titles are read which half of the rows lack
_FILLED = 0.9
# texts of a column, and of its rows; a query may stand in several, with a passage in each
_FEWEST_TEXTS, _DIFFERENT = 5, 0.05
# Thai, Lao, Burmese, Khmer, kana and Chinese characters, between whose words there is no blank
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_WIDTH = 95


def column_lines(source: Records, *, several: bool) -> list[str]:
    """What a recipe says of the columns of a table.

    Args:
        source: of which the first rows are read.
        several: whether every column with texts is read, or one.

    Raises:
        UserError: there are no rows, or none of their columns holds text.
    """
    # a table gives the columns that it is asked for, a file all of them
    asked = source.rows.column_names if isinstance(source, Table) else ()
    rows = list(islice(source.records(asked), _ROWS))
    if not rows:
        raise UserError(f"{source.called()}: no rows in it; give text to learn from")
    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = [Column(name, tuple(row.get(name) for _, row in rows)) for name in names]
    if not any(column.texts for column in columns):
        _refuse(*rows[0], columns)
    return list(_of_several(columns) if several else _of_one(columns))


@dataclass(frozen=True)
class Column:
    """A column of the first rows."""

    name: str
    cells: tuple[Any, ...]
    """One for each row; `None` where the row has none."""

    @cached_property
    def texts(self) -> list[str]:
        """The cells that are texts."""
        return [cell for cell in self.cells if isinstance(cell, str) and _words(cell)]

    @cached_property
    def lists(self) -> list[list[str]]:
        """The cells that are lists of texts, at least one in each."""
        return [
            cell
            for cell in self.cells
            if isinstance(cell, list)
            and cell
            and all(isinstance(text, str) and text.strip() for text in cell)
        ]

    @property
    def filled(self) -> bool:
        """Whether nearly every row has a text in it."""
        return len(self.texts) >= _FILLED * len(self.cells)

    @property
    def size(self) -> int:
        """Characters of all different texts."""
        return sum(map(len, {*self.texts, *chain(*self.lists)}))

    @cached_property
    def problem(self) -> str | None:
        """Why neither its texts nor its lists of texts should be read; `None` where one of both
        should."""
        if any(map(is_conversation, self.cells)):
            return "conversations"
        if not self.texts and not self.lists:
            return "no text"
        rows = len(self.cells)
        if self.texts and not self.filled:
            return f"no text in {rows - len(self.texts)} of {rows} rows"
        texts = self.texts or [*chain(*self.lists)]
        different = len(set(texts))
        if different < min(rows / 2, max(_FEWEST_TEXTS, _DIFFERENT * rows)):
            return f"{different} different in {rows} rows"
        if sum(map(_words, texts)) < _FEWEST_WORDS * len(texts):
            return "single words"
        if not self.texts:
            lengths = {len(cell) if isinstance(cell, list) else 0 for cell in self.cells}
            if len(lengths) > 1:
                return f"lists of {min(lengths)} to {max(lengths)} texts, expected as many in each"
        return None


def _of_several(columns: Sequence[Column]) -> Iterator[str]:
    """Every column of texts and, last, one of lists."""
    readable = [column for column in columns if column.problem is None]
    texts = (
        [column for column in readable if column.texts]
        # short ones may be all there is
        or [column for column in columns if column.filled]
        or [_largest(columns)]
    )
    lists = [column for column in readable if not column.texts]
    listed = max(lists, key=lambda column: column.size, default=None)
    taken = texts if listed is None else [*texts, listed]
    left = [
        (column, column.problem or "lists of texts, of which one column is read")
        for column in columns
        if column not in taken
    ]
    if len(taken) == 1:
        yield from _text_column(texts[0], left)
        return
    says = "texts of a row: leave out what is none; what is held out is decided by the first"
    yield from _comment(says, left)
    yield f"  columns: [{', '.join(quoted(column.name) for column in taken)}]"
    if listed is not None:
        yield f"  # texts in each list of the last\n  candidates: {len(listed.lists[0])}"


def _of_one(columns: Sequence[Column]) -> Iterator[str]:
    """The column with the most text, or the one that is called text."""
    usual = [column for column in columns if column.name == "text" and column.texts]
    taken = _largest(usual or columns)
    left = [
        (column, column.problem or ("texts" if column.texts else "lists of texts"))
        for column in columns
        if column is not taken
    ]
    yield from _text_column(taken, left)


def _largest(columns: Iterable[Column]) -> Column:
    return max((column for column in columns if column.texts), key=lambda column: column.size)


def _text_column(column: Column, left: Iterable[tuple[Column, str]]) -> Iterator[str]:
    yield from _comment("the column that is read", left)
    yield f"  text_column: {quoted(column.name)}"


def _comment(says: str, left: Iterable[tuple[Column, str]]) -> list[str]:
    """A comment, and in it the columns that are not read, each with the reason."""
    named = [f"{printable(column.name)} ({reason})" for column, reason in left]
    return textwrap.wrap(
        f"{says}; left out: {some_of(named)}" if named else says,
        _WIDTH,
        initial_indent="  # ",
        subsequent_indent="  # ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _refuse(where: str, row: Mapping[str, Any], columns: Sequence[Column]) -> NoReturn:
    """Raise over columns of which none holds one text; `row` is the first, found at `where`."""
    for name, value in row.items():
        if is_conversation(value):
            # which is told what to do
            checked_text(value, name, where)
    lists = [column.name for column in columns if column.lists]
    if lists:
        raise UserError(
            f"{where}: no column holds one text, and {lists[0]!r} holds lists, which are read "
            "beside a query; write their texts into rows of their own"
        )
    names = ", ".join(repr(column.name) for column in columns)
    raise UserError(f"{where}: no column holds text; it has {names}")


def _words(text: str) -> int:
    """Words of a text; numbers and dates are none."""
    return sum(
        max(1, len(_UNSPACED.findall(piece)))
        for piece in text.split()
        if any(map(str.isalpha, piece)) and math.isnan(number_in(piece))
    )
