"""Tokenised examples of a task: sequences of tokens, each with its label."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from fastkd.data.sequences import (
    PAD_MULTIPLE,
    Batch,
    Sequences,
    SequenceWriter,
    Tokenised,
    open_sequences,
    token_dtype,
    tokenise,
)
from fastkd.data.tasks.read import Example, ExampleSource
from fastkd.data.text.cache import (
    cache_key,
    needs_build,
    new_folder,
    read_meta,
    tokenizer_digest,
    write_meta,
)
from fastkd.data.text.tokenize import batched, in_order
from fastkd.files.flat import flat_file, open_flat
from fastkd.files.home import at_home
from fastkd.reporting.progress import progress_bar

logger = logging.getLogger(__name__)

_FORMAT = 1
_FIELD = "task.cache"


@dataclass(frozen=True)
class EncodedExamples(Sequences):
    """Token ids of examples, special tokens included, with `labels` [examples] in every batch,
    int64 classes or fp32 scores."""

    labels: npt.NDArray[np.integer] | npt.NDArray[np.float32]
    """[examples], or what another kind of task has."""
    fingerprint: str
    """Key of content, tokenizer and settings."""

    def batch(self, rows: Sequence[int], multiple: int = PAD_MULTIPLE) -> Batch:
        return {**super().batch(rows, multiple), "labels": self._labels_of(rows)}

    def packed(self, rows: Sequence[int]) -> Batch:
        return {**super().packed(rows), "labels": self._labels_of(rows)}

    def _labels_of(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.labels[np.asarray(rows)])


class Beside(NamedTuple):
    """A file of numbers that are stored beside the tokens."""

    dtype: npt.DTypeLike
    per_token: bool = False
    """Whether it holds some a token, or some an example."""
    width: int = 1
    """How many."""


class Form(Protocol):
    """How examples of one kind become sequences, and what is stored beside these."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What of it decides what is stored."""

    @property
    def files(self) -> Mapping[str, Beside]:
        """What is stored beside the sequences; `labels` are among it."""

    def tokenise(
        self, chunk: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[Tokenised, Mapping[str, Iterable[float]]]:
        """Sequences of some examples and, by file, the numbers beside all of them."""

    def opened(
        self, found: EncodedExamples, beside: Mapping[str, npt.NDArray[Any]]
    ) -> EncodedExamples:
        """What was stored, with all that is read of it."""


@dataclass(frozen=True)
class TextForm:
    """A `Form` of texts or pairs of texts with a class or a score each."""

    regression: bool

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    @property
    def files(self) -> Mapping[str, Beside]:
        return {"labels": Beside(np.float32 if self.regression else np.int64)}

    def tokenise(
        self, chunk: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[Tokenised, Mapping[str, Iterable[float]]]:
        first, *second = zip(*(example.texts for example in chunk), strict=True)
        made = tokenise(first, second[0] if second else None, tokenizer, max_length)
        return made, {"labels": [example.label for example in chunk]}

    def opened(
        self, found: EncodedExamples, beside: Mapping[str, npt.NDArray[Any]]
    ) -> EncodedExamples:
        return found


def encode_examples(
    examples: ExampleSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    token_types: bool,
    cache: str | Path,
    build: bool = True,
    progress: bool = True,
    form: Form | None = None,
) -> EncodedExamples:
    """Tokenise examples, or open what an earlier run stored.

    With several ranks the first one calls this alone; the others call it afterwards with
    `build=False`, which opens the cache and raises `UserError` where there is none.

    Args:
        examples: from `read_examples` or `augment`; iterated only where nothing is stored.
        tokenizer: of the model; a pair is framed as it frames pairs.
        max_length: tokens of an example, special tokens included; longer ones are cut, the longer
            text of a pair first.
        token_types: whether the model wants them, see `uses_token_types`.
        cache: folder of all cached data.
        build: whether to make what is not there.
        progress: whether to show a bar.
        form: of the examples; that of texts with a label each where not given.

    Raises:
        UserError: no room for text in `max_length`, or a cache that can't be read or written.
    """
    form = form or TextForm(examples.regression)
    settings = {
        "task": _FORMAT,
        "examples": examples.digest,
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "token_types": token_types,
        **form.settings,
    }
    key = cache_key(settings)
    folder = at_home(cache, _FIELD) / key
    if needs_build(folder, _FIELD, build=build):
        _build(folder, examples, tokenizer, max_length, token_types, progress, form)
    meta = read_meta(folder, _FIELD)
    if meta["truncated"]:
        logger.warning(
            "%d of %d examples are longer than %d tokens and were cut",
            meta["truncated"],
            meta["examples"],
            max_length,
        )
    sequences = open_sequences(
        folder,
        tokenizer,
        sequences=meta["examples"],
        tokens=meta["tokens"],
        token_types=token_types,
        max_length=max_length,
        field=_FIELD,
    )
    sizes = meta["examples"], meta["tokens"]
    beside = {
        name: open_flat(folder, name, of.dtype, sizes[of.per_token] * of.width, _FIELD)
        for name, of in form.files.items()
    }
    found = EncodedExamples(**vars(sequences), labels=beside["labels"], fingerprint=key)
    return form.opened(found, beside)


def _build(
    folder: Path,
    examples: ExampleSource,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    token_types: bool,
    progress: bool,
    form: Form,
) -> None:
    with ExitStack() as stack:
        temporary = stack.enter_context(new_folder(folder, _FIELD))
        bar = stack.enter_context(progress_bar(progress))
        task = bar.add_task("tokenising examples", total=None)
        kind = token_dtype(tokenizer)
        writer = stack.enter_context(SequenceWriter(temporary, kind, token_types=token_types))
        with ExitStack() as files:
            write = {
                name: files.enter_context(flat_file(temporary, name).open("wb"))
                for name in form.files
            }
            tokenised = partial(_tokenised, form, tokenizer, max_length)
            for made, beside in in_order(tokenised, batched(examples, _characters)):
                writer.write(made)
                for name, numbers in beside.items():
                    numbers.tofile(write[name])
                bar.update(task, completed=writer.sequences)
        writer.close()
        meta = {
            "examples": writer.sequences,
            "tokens": writer.tokens,
            "truncated": writer.cut,
        }
        write_meta(temporary, meta)


def _tokenised(
    form: Form,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chunk: Sequence[Example],
) -> tuple[Tokenised, dict[str, npt.NDArray[Any]]]:
    """What a form makes of some examples, as it is stored."""
    made, beside = form.tokenise(chunk, tokenizer, max_length)
    files = form.files.items()
    return made, {name: np.fromiter(beside[name], dtype=of.dtype) for name, of in files}


def _characters(example: Example) -> int:
    return sum(map(len, example.texts))
