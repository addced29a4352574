"""Rows as they stand in files and tables, checked: texts, and a teacher's scores of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fastkd.data.text.files import TEXT_COLUMN, Records, Source, checked_text, number_in
from fastkd.errors import UserError
from fastkd.row_form import RowForm
from fastkd.types import LARGEST_SCORE

_REMEDY = "mend or remove the row"
# a mark, perhaps with what closes a quote or bracket, then a blank before what begins a sentence
_SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]”]*\s+(?=["'(\[“]*[A-Z0-9À-ÖØ-Þ])""")
# of what ends sooner, the mark is rather of an abbreviation or a number
_FEWEST_WORDS = 3


class TextRow(NamedTuple):
    """The texts of a row, without prompts, and the scores of those after the first."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def characters(self) -> int:
        """Characters of all texts."""
        return sum(map(len, self.texts))


def read_rows(
    sources: Iterable[Source], form: RowForm, field: str = "data.columns or data.scores"
) -> Iterator[TextRow]:
    """All rows of some sources, in their order.

    Args:
        sources: with columns or, where a row is one text and no column is named, without.
        form: what a row is.
        field: of the recipe that names columns.

    Raises:
        UserError: with file and line: a missing column, a text that is empty or no text, a list of
            candidates or scores that is none or of another length, a score that is not finite.
    """
    wanted = (*form.columns, *form.scores)
    field = field if form.named or form.scores else TEXT_COLUMN
    for source in sources:
        if isinstance(source, Records):
            for where, record in source.records(wanted, field):
                texts = tuple(_texts(record, form, where))
                if form.sentences:
                    yield from _sentence_rows(texts[0])
                else:
                    yield TextRow(texts, tuple(_scores(record, form, where)))
        else:
            _check_plain(source, form)
            for text in source.documents():
                # a line without words is no row
                yield from _sentence_rows(text) if form.sentences else [TextRow((text,), ())]


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, each with single blanks between its words.

    One ends at `.`, `!` or `?`, and what closes a quote or a bracket, before a blank and a capital
    letter or a digit; but not within its first two words, as in `Dr. Smith` or `1. Introduction`.
    """
    held: list[str] = []
    start = 0
    for end in _SENTENCE_END.finditer(text):
        held += text[start : end.end()].split()
        start = end.end()
        if len(held) >= _FEWEST_WORDS:
            yield " ".join(held)
            held = []
    held += text[start:].split()
    if held:
        yield " ".join(held)


def _sentence_rows(text: str) -> Iterator[TextRow]:
    return (TextRow((sentence,), ()) for sentence in sentences(text))


def _check_plain(source: Source, form: RowForm) -> None:
    given = "columns" if form.named else "scores"
    if form.named or form.scores:
        raise UserError(
            f"data.{given} is given, but {source.called()} is plain text, which has no columns; "
            f"give .csv, .tsv, .jsonl or .parquet, or leave {given} out"
        )


def _texts(record: Mapping[str, Any], form: RowForm, where: str) -> Iterator[str]:
    single = form.columns if form.candidates is None else form.columns[:-1]
    for column in single:
        yield _text(record[column], column, where)
    if form.candidates is not None:
        column = form.columns[-1]
        listed = _listed(record[column], form.candidates, column, where, "texts")
        for number, value in enumerate(listed):
            yield _text(value, f"{column}[{number}]", where)


def _text(value: object, column: str, where: str) -> str:
    text = checked_text(value, column, where)
    if not text.strip():
        raise UserError(f"{where}: column {column!r} is empty, expected text; {_REMEDY}")
    return text


def _scores(record: Mapping[str, Any], form: RowForm, where: str) -> Iterator[float]:
    if not form.scores:
        return
    if len(form.scores) == form.scored:
        for column in form.scores:
            yield _score(record[column], column, where)
        return
    (column,) = form.scores
    for number, value in enumerate(_listed(record[column], form.scored, column, where, "scores")):
        yield _score(value, f"{column}[{number}]", where)


def _score(value: object, column: str, where: str) -> float:
    score = number_in(value)
    if not math.isfinite(score):
        raise UserError(
            f"{where}: column {column!r} holds {value!r:.50}, expected a finite score; {_REMEDY}"
        )
    if abs(score) > LARGEST_SCORE:
        raise UserError(
            f"{where}: column {column!r} holds {value!r:.50}, expected a score of at most "
            f"{LARGEST_SCORE:.4g}, as fp32 holds it; {_REMEDY}"
        )
    return score


def _listed(value: object, count: int, column: str, where: str, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        given = "null" if value is None else type(value).__name__
        found = f"{len(value) or 'no'} {what}" if isinstance(value, list) else given
        raise UserError(
            f"{where}: column {column!r} holds {found}, expected a list of {count} {what}; "
            f"{_REMEDY}"
        )
    return value
