"""The section of what embeddings are worth: sentence pairs that people have scored, MTEB."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from fastkd.section import Name, Place, Section

_NAME = re.compile(r"[A-Za-z][\w-]*")
# what else an evaluation calls a number
_TAKEN = ("total", "score", "sentence_cosine", "perplexity", "pseudo_perplexity", "spearman")


class SentencePairs(Section):
    """Pairs of texts and how alike they are, in the form of STS-B."""

    path: Place
    """File (.tsv, .csv, .jsonl, .parquet, also gzipped), a saved `datasets` folder, or a hub
    name."""
    split: Name = "test"
    """Split of a hub data set or saved folder; its own, where it was saved as one split."""
    sentence1: Name = "sentence1"
    """Column of the first text."""
    sentence2: Name = "sentence2"
    """Column of the second text."""
    score: Name = "score"
    """Column of the score: the more alike, the larger; its scale does not matter."""
    prompt: str | None = None
    """What is put before both texts; where not given, what the teacher's folder puts before a text
    (`default_prompt_name`)."""


class Evaluate(Section):
    """What both models' embeddings are scored on at every evaluation, besides held-out losses."""

    pairs: dict[str, SentencePairs] = Field(default_factory=dict)
    """By a name that tables and `run.keep_best` have: a file, or a section. The score is Spearman's
    correlation of the cosines with the files' scores. Texts longer than `data.block_size` are
    cut."""
    mteb: tuple[Name, ...] = ()
    """Tasks of the package `mteb` (an extra of fastkd's), such as `NanoSciFactRetrieval`; of each
    its main score."""
    mteb_prompts: dict[Name, str] = Field(default_factory=dict)
    """What is put before texts of retrieval tasks, by `query` and `document`. Where not
    given what the student is exported with: the teacher's own prompts, and those of the data."""

    @field_validator("pairs", mode="before")
    @classmethod
    def _short_pairs(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {k: {"path": path} if isinstance(path, str) else path for k, path in given.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.pairs and not self.mteb:
            raise ValueError("neither pairs nor mteb is given; give one, or leave evaluate out")
        for name in self.pairs:
            if not _NAME.fullmatch(name) or name in _TAKEN:
                raise ValueError(
                    f"pairs can't be called {name[:50]!r}; give a name of letters, digits, - and _ "
                    f"that begins with a letter and is none of {', '.join(_TAKEN)}"
                )
        unknown = [name for name in self.mteb_prompts if name not in ("query", "document")]
        if unknown:
            raise ValueError(f"mteb_prompts has {unknown[0]!r}, expected query or document")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of everything that has a score."""
        return (*self.pairs, *self.mteb)
