"""Files of CoNLL: a word and its class a line, an empty line between texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastkd.data.tasks.rows import Row
from fastkd.data.text.files import text_lines
from fastkd.errors import UserError

# between documents in the files of CoNLL-2003
_DOCUMENT = "-DOCSTART-"
# a comment of CoNLL-U that names what it holds
_NAMED = re.compile(r"# *[\w.:-]+ = ")
# an identifier of a word, the word, its class
_FEWEST_NUMBERED = 3


class _Form(NamedTuple):
    """How the first line with a word looks, and so all of them."""

    line: int
    tabs: bool
    columns: int


class _Line(NamedTuple):
    """A line with a word."""

    number: int
    cells: list[str]


def conll_rows(path: Path) -> Iterator[Row]:
    """Rows of a file with a word and its class a line, in the first and the last column.

    Columns end at the TABs of a line, or at blanks where it has none. A line that begins with `#`
    and a blank is a comment, as in CoNLL-U, unless it has the columns of a word.

    Raises:
        UserError: the file can't be read, or its first column counts the words.
    """
    form = _form_of(path)
    counted, longest = True, 0
    for lines in _texts(path, form):
        assert form is not None, "a line has a word"
        row = _row(path, lines, form)
        yield row
        if row.problem is None:
            counts = [str(number) for number, _ in enumerate(lines, start=1)]
            counted = counted and counts == [line.cells[0] for line in lines]
            longest = max(longest, len(lines))
    if form is not None and form.columns >= _FEWEST_NUMBERED and counted and longest > 1:
        raise UserError(
            f"{path}: the first column counts the words of every text, expected the words; leave "
            "that column out"
        )


def _form_of(path: Path) -> _Form | None:
    for number, line in enumerate(text_lines(path), start=1):
        cells = _cells(line)
        if cells and cells[0] != _DOCUMENT and not line.startswith("# "):
            return _Form(number, "\t" in line, len(cells))
    return None


def _texts(path: Path, form: _Form | None) -> Iterator[list[_Line]]:
    held: list[_Line] = []
    for number, line in enumerate(text_lines(path), start=1):
        cells = _cells(line)
        if not cells or cells[0] == _DOCUMENT:
            if held:
                yield held
            held = []
        elif not _is_comment(line, len(cells), form):
            held.append(_Line(number, cells))
    if held:
        yield held


def _cells(line: str) -> list[str]:
    if not line.strip():
        return []
    if "\t" in line:
        return [cell.strip(" ") for cell in line.split("\t")]
    # other blanks, such as those in 10 000, are a word's own
    return [cell for cell in line.split(" ") if cell]


def _is_comment(line: str, columns: int, form: _Form | None) -> bool:
    if not line.startswith("# ") or "\t" in line:
        return False
    # # may be a word: then its class stands in the last column
    as_word = form is not None and not form.tabs and columns == form.columns
    return not as_word or _NAMED.match(line) is not None


def _row(path: Path, lines: Sequence[_Line], form: _Form) -> Row:
    for line in lines:
        problem = _problem(line.cells, form)
        if problem is not None:
            return Row(f"{path}, line {line.number}", (), None, problem)
    words = [line.cells[0] for line in lines]
    return Row(f"{path}, line {lines[0].number}", (words,), [line.cells[-1] for line in lines])


def _problem(cells: Sequence[str], form: _Form) -> str | None:
    if len(cells) == 1:
        return f"one column, {cells[0]!r:.80}, expected a word and a class"
    if len(cells) != form.columns:
        return f"{len(cells)} columns, expected {form.columns} as line {form.line} has"
    if not cells[0] or not cells[-1]:
        return f"no {'word' if not cells[0] else 'class'} in the {len(cells)} columns"
    return None
