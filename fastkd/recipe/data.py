"""The section of the text that both models read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fastkd.section import (
    LONGEST,
    Place,
    Section,
)


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


Sources = Annotated[tuple[Place, ...], BeforeValidator(_one_or_many), Field(min_length=1)]


class Data(Section):
    """Text, cut into documents, tokenised once and packed into blocks without padding."""

    train: Sources
    """Files, folders or globs (.txt, .txt.gz, .jsonl, .jsonl.gz, .parquet), a saved `datasets`
    folder, a hub name (`NAME`, `NAME:SUBSET`), or `python-docs`, the help texts inside every
    Python."""
    heldout: Sources | None = None
    """Text that is never trained on, in the same forms; else a part of `train` is held out."""
    heldout_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents that is held out where `heldout` is not given."""
    heldout_blocks: int = Field(default=256, gt=0, le=10_000_000)
    """Held-out blocks that an evaluation uses, at most: spread over the held-out text, or the
    first of them when streaming."""
    split: str = "train"
    """Split of a hub data set or folder."""
    text_column: str = "text"
    """Column that holds the text (.jsonl, .parquet, data sets)."""
    documents: Literal["paragraph", "line"] = "paragraph"
    """In plain text a document ends at an empty line, or at every line end."""
    block_size: int = Field(default=128, ge=8, le=LONGEST)
    """Tokens in a block, special tokens included."""
    streaming: bool = False
    """Read and tokenise while training, without storing the tokens; several ranks share the
    tokenising."""
    shuffle_buffer: int = Field(default=1000, ge=1, le=10_000_000)
    """Documents that a streamed shuffle holds."""
    workers: int | None = Field(default=None, ge=0, le=1024)
    """Processes that tokenise, of each rank when streaming; 0 for none. Where not given one a core,
    when streaming up to four of a rank that leave it a core."""
    cache: Place = "~/.cache/fastkd"
    """Folder of tokenised data, shared by all runs."""
