"""Rows of CSV and TSV files, whose first line names the columns.

CSV is as RFC 4180 has it, read by Python's `csv`: a cell in quotes may hold commas, doubled quotes
and line ends. TSV has no quotes: a row is a line, split at every TAB, and what looks quoted as
pandas and spreadsheets write it is refused or named.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.data.text.files import (
    DOCUMENT_LIMIT,
    TEXT_COLUMN,
    OneFile,
    Records,
    file_digest,
    require_columns,
    require_once,
    text_lines,
)
from fastkd.errors import UserError, one_line

logger = logging.getLogger(__name__)

# one sentence in quotes may well be a quotation
_FEWEST_QUOTED = 2


@dataclass(frozen=True)
class Delimited(OneFile, Records):
    """A CSV or TSV file, plain or gzipped."""

    column: str

    def records(
        self, columns: Sequence[str], field: str = TEXT_COLUMN
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return delimited_rows(self.path, columns, field)

    def digest(self, *, quick: bool) -> str:
        form = "tsv" if is_tsv(self.path) else "csv"
        return f"{form} {self.column} {file_digest(self.path, quick=quick)}"


def is_tsv(path: Path) -> bool:
    """Whether a file's name says that cells end at a TAB."""
    return path.name.lower().removesuffix(".gz").endswith(".tsv")


def delimited_rows(
    path: Path, columns: Sequence[str], field: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV or TSV file by column, each with its place; empty lines are passed over.

    Args:
        path: UTF-8, plain or gzipped; its name says which of the two it is.
        columns: that there are, at least.
        field: of the recipe that names them.

    Raises:
        UserError: the file can't be read, lacks a column or names one twice, or a row has another
            number of cells than the first line.
    """
    lines = _tsv_cells(path) if is_tsv(path) else _csv_cells(path)
    split = "TAB" if is_tsv(path) else "comma"
    names: list[str] = []
    for number, cells in lines:
        where = f"{path}, line {number}"
        if not names:
            names = cells
            # rows have their cells by name
            require_once(names, names, where)
            require_columns(columns, names, where, field)
        elif len(cells) != len(names):
            raise UserError(
                f"{where}: {len(cells)} cells, expected {len(names)} split by {split}, as the "
                "first line has; mend or remove the row"
            )
        else:
            yield where, dict(zip(names, cells, strict=True))


def unquoted(path: Path, rows: Iterable[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    """Pass on the cells of a TSV file by line, which are read as they stand.

    A cell in quotes whose own quotes are all doubled was written for a reader that undoes them, so
    it is refused. Quotes around exactly those cells that hold a comma or a quote are what a
    spreadsheet writes, but may be the text's own: they are named once the file has been read.

    Raises:
        UserError: with file and line, the former.
    """
    spreadsheet, found = True, []
    for number, cells in rows:
        for cell in cells:
            quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
            inner = cell[1:-1] if quoted else cell
            if quoted and '""' in inner and '"' not in inner.replace('""', ""):
                raise UserError(
                    f"{path}, line {number}: a cell looks quoted ({cell!r:.50}), but TSV is read "
                    "without quotes; save it as .csv"
                )
            spreadsheet = spreadsheet and quoted == ("," in inner or '"' in inner)
            if spreadsheet and quoted:
                found.append(number)
        yield number, cells
    if spreadsheet and len(found) >= _FEWEST_QUOTED:
        logger.warning(
            "%s, line %d and %d more: quotes stand around all cells with a comma and no others, "
            "and TSV is read with them; if a spreadsheet put them there, save it as .csv",
            *(path, found[0], len(found) - 1),
        )


def _tsv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    lines = enumerate(text_lines(path), start=1)
    # a line of TABs is a row of empty cells, as one of commas is
    rows = ((number, line) for number, line in lines if "\t" in line or line.strip())
    return unquoted(path, ((number, line.split("\t")) for number, line in rows))


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Cells of each row, with the line that it begins in."""
    # of the process; its own limit is 128 KiB a cell
    csv.field_size_limit(DOCUMENT_LIMIT)
    reader = csv.reader((line + "\n" for line in text_lines(path)), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}, line {first}: not CSV ({one_line(error)}); put a cell that holds quotes, "
                "commas or line ends in quotes, and double the quotes in it"
            ) from error
        if cells:
            yield first, cells
