"""The section of the text that both models read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from pydantic import Field, model_validator

from fastkd.row_form import RowForm
from fastkd.section import (
    LONGEST,
    MOST_TOKENS,
    CachePlace,
    Name,
    Names,
    Places,
    Section,
)
from fastkd.types import Unit

_OF_ROWS = ("columns", "candidates", "scores", "prompts", "batch_tokens")


class Data(Section):
    """Text, tokenised once: cut into documents and packed into blocks without padding, or one text
    a row, or several, each read by itself."""

    train: Places
    """Files, folders or globs (.txt, .csv, .tsv, .jsonl, also with .gz, and .parquet), a saved
    `datasets` folder, a hub name (`NAME`, `NAME:SUBSET`), or `python-docs`, the help texts inside
    every Python."""
    heldout: Places | None = None
    """Text that is never trained on, in the same forms; else a part of `train` is held out."""
    heldout_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents that is held out where `heldout` is not given."""
    heldout_blocks: int = Field(default=256, gt=0, le=10_000_000)
    """Held-out blocks or rows that an evaluation uses, at most: spread over the held-out text, or
    the first of them when streaming."""
    split: str = "train"
    """Split of a hub data set or saved folder. Of a folder that was saved as one split it has to be
    that one; with `train` `heldout` may be of any."""
    text_column: str = "text"
    """Column that holds the text (.csv, .tsv, .jsonl, .parquet, data sets)."""
    documents: Unit = "paragraph"
    """In plain text a document ends at an empty line, or at every line end; documents are packed.
    With `row` every row (of plain text, every line) is read by itself, framed by the tokenizer and
    padded with rows of similar length; longer ones are cut. With `sentence` so is every sentence:
    it ends at `.`, `!` or `?` before a blank and a capital letter, digit or quote, but not within
    its first two words."""
    columns: Names | None = None
    """With `row`, the columns of the texts of a row, `text_column` where not given. A model without
    a task head reads each text by itself, the query first; a classifier reads the first text in a
    pair with each of the others."""
    candidates: int | None = Field(default=None, ge=1, le=10_000)
    """With `row`, how many texts the last of the columns holds, each row a list of so many."""
    scores: Names | None = None
    """With `row`, columns with a teacher's scores of the texts after the first: one for each text,
    or one that holds a list."""
    prompts: dict[Name, str] = Field(default_factory=dict)
    """With `row`, what is put before the texts of a column, as `{query: "query: "}`. Columns that
    aren't named get what the teacher's folder puts before a text (`default_prompt_name`); an empty
    prompt leaves it out."""
    batch_tokens: int | None = Field(default=None, ge=8, le=MOST_TOKENS)
    """With `row`, tokens of a micro-batch at most, padding included: a micro-batch has as many rows
    as that allows, and a step as many micro-batches as its rows take, in place of
    `train.micro_batch_size`. Results don't depend on it, and a run can be resumed with another."""
    block_size: int = Field(default=128, ge=8, le=LONGEST)
    """Tokens in a block, or of a sequence of a row at most, special tokens included."""
    streaming: bool = False
    """Read and tokenise while training, without storing the tokens; several ranks share the
    tokenising."""
    shuffle_buffer: int = Field(default=1000, ge=1, le=10_000_000)
    """Documents that a streamed shuffle holds."""
    workers: int | None = Field(default=None, ge=0, le=1024)
    """Processes that tokenise, of each rank when streaming; 0 for none. Where not given one a core,
    when streaming up to four of a rank that leave it a core."""
    cache: CachePlace = "~/.cache/fastkd"
    """Folder of tokenised data, shared by all runs and by all machines of one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    @property
    def by_rows(self) -> bool:
        """Whether texts are read by themselves, in place of packed blocks."""
        return self.documents in ("row", "sentence")

    def form(self, *, paired: bool) -> RowForm:
        """What a row is; of text in blocks, one text.

        Args:
            paired: whether the models have a classification head, which reads pairs of texts.
        """
        columns = self.columns or (self.text_column,)
        return RowForm(
            columns=columns,
            sentences=self.documents == "sentence",
            named=self.columns is not None,
            candidates=self.candidates,
            scores=self.scores or (),
            prompts=self.prompts,
            paired=paired and len(columns) > 1,
        )

    def _problems(self) -> Iterator[str]:
        if not self.by_rows:
            given = [name for name in _OF_ROWS if getattr(self, name)]
            if given:
                yield (
                    f"{given[0]} is given, but documents is {self.documents}, whose texts are "
                    f"packed into blocks; set documents to row, or leave {given[0]} out"
                )
            return
        if self.streaming:
            yield (
                f"streaming is true and documents is {self.documents}, whose rows are sorted by "
                "length before they are read; set streaming to false"
            )
        columns = self.columns or (self.text_column,)
        if self.documents == "sentence" and len(columns) > 1:
            yield (
                f"documents is sentence, which splits one text, but columns names {len(columns)}; "
                "set documents to row"
            )
        twice = [name for name in columns if columns.count(name) > 1]
        if twice:
            yield f"columns names {twice[0]!r} twice; give each column once"
        if self.candidates is not None and len(columns) < 2:
            yield (
                f"candidates is {self.candidates}, but columns names {len(columns)}, expected a "
                "query's and, last, that of a list of texts"
            )
        unread = [name for name in self.prompts if name not in columns]
        if unread:
            yield (
                f"prompts has one for {unread[0]!r}, which is not read; expected some of "
                f"{', '.join(columns)}"
            )
        yield from self._score_problems(len(self.form(paired=False).texts) - 1)

    def _score_problems(self, candidates: int) -> Iterator[str]:
        if not self.scores:
            return
        if not candidates:
            yield "scores is given, but a row is one text; name the texts they are of in columns"
        elif len(self.scores) not in (1, candidates):
            yield (
                f"scores names {len(self.scores)} columns for {candidates} texts after the first; "
                "give one for each, or one that holds a list"
            )
