"""What a row of texts is: its columns, the texts in them, and the sequences that models read of it.

A recipe says all of it, so it is known before any data is read; it loads neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class RowForm:
    """The form of every row of a data set.

    Row `r` of a batch has the sequences `r * n` to `r * n + n - 1`, where `n` is the number of its
    `sequences`.
    """

    columns: tuple[str, ...] = ("text",)
    """Columns with texts; the first is the query where there are several."""
    sentences: bool = False
    """Whether every sentence of a text is a row of its own."""
    named: bool = False
    """Whether a recipe names them, so that plain text has none of them."""
    candidates: int | None = None
    """Texts in the list that the last column holds; `None` where every column holds one text."""
    scores: tuple[str, ...] = ()
    """Columns with scores of the candidates: one for each, or one with a list of them."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What stands before the texts of a column."""
    paired: bool = False
    """Whether a sequence is the first text with one of the others, as a reranker reads them; else
    every text is one."""

    def with_default(self, prompt: str) -> RowForm:
        """This form, with a prompt before the texts of columns that have none of their own; of a
        pair before the first text alone."""
        if not prompt:
            return self
        columns = self.columns[:1] if self.paired else self.columns
        return replace(self, prompts={**dict.fromkeys(columns, prompt), **self.prompts})

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """What each text of a row is: its column or, of a list, `column[0]`, `column[1]` ..."""
        if self.candidates is None:
            return self.columns
        *single, listed = self.columns
        return (*single, *(f"{listed}[{number}]" for number in range(self.candidates)))

    @property
    def sequences(self) -> tuple[str, ...]:
        """What each sequence of a row is; of pairs, the text that the first one is paired with."""
        return self.texts[1:] if self.paired else self.texts

    @property
    def scored(self) -> int:
        """Scores of a row; 0 where the data has none."""
        return len(self.texts) - 1 if self.scores else 0

    @cached_property
    def prompt_of(self) -> tuple[str, ...]:
        """What stands before each of `texts`."""
        of = [self.prompts.get(column, "") for column in self.columns]
        return (*of[:-1], *of[-1:] * (len(self.texts) - len(of) + 1))
