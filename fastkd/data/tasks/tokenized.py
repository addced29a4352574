"""Tokenised examples of a task: sequences of tokens, each with its label."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from fastkd.data.sequences import (
    PAD_MULTIPLE,
    Batch,
    Sequences,
    SequenceWriter,
    open_sequences,
    token_dtype,
    tokenise,
)
from fastkd.data.tasks.read import Example, ExampleSource
from fastkd.data.text.cache import (
    cache_key,
    is_complete,
    new_folder,
    read_meta,
    tokenizer_digest,
    write_meta,
)
from fastkd.errors import UserError
from fastkd.files.flat import (
    append,
    flat_file,
    open_flat,
)
from fastkd.reporting.progress import progress_bar

logger = logging.getLogger(__name__)

_CHUNK = 2048
_FORMAT = 1
_FIELD = "task.cache"


@dataclass(frozen=True)
class EncodedExamples(Sequences):
    """Token ids of examples, special tokens included, with `labels` [examples] in every batch,
    int64 classes or fp32 scores."""

    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    """[examples]."""
    fingerprint: str
    """Key of content, tokenizer and settings."""

    def batch(self, rows: Sequence[int], multiple: int = PAD_MULTIPLE) -> Batch:
        return {**super().batch(rows, multiple), "labels": self._labels_of(rows)}

    def packed(self, rows: Sequence[int]) -> Batch:
        return {**super().packed(rows), "labels": self._labels_of(rows)}

    def _labels_of(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.labels[np.asarray(rows)])


def encode_examples(
    examples: ExampleSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    token_types: bool,
    cache: str | Path,
    build: bool = True,
    progress: bool = True,
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

    Raises:
        UserError: no room for text in `max_length`, or a cache that can't be read or written.
    """
    settings = {
        "task": _FORMAT,
        "examples": examples.digest,
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "token_types": token_types,
    }
    key = cache_key(settings)
    folder = Path(cache).expanduser() / key
    if not is_complete(folder, _FIELD, build=build):
        if not build:
            raise UserError(
                f"task.cache: {folder} is missing; rank 0 builds it first, so all ranks must see "
                "the same files and the same cache folder"
            )
        _build(folder, examples, tokenizer, max_length, token_types, progress)
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
    return EncodedExamples(
        **vars(sequences),
        labels=open_flat(folder, "labels", _label_dtype(examples), meta["examples"], _FIELD),
        fingerprint=key,
    )


def _build(
    folder: Path,
    examples: ExampleSource,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    token_types: bool,
    progress: bool,
) -> None:
    label = _label_dtype(examples)
    with ExitStack() as stack:
        temporary = stack.enter_context(new_folder(folder, _FIELD))
        bar = stack.enter_context(progress_bar(progress))
        task = bar.add_task("tokenising examples", total=None)
        kind = token_dtype(tokenizer)
        writer = stack.enter_context(SequenceWriter(temporary, kind, token_types=token_types))
        with flat_file(temporary, "labels").open("wb") as labels:
            for chunk in _chunks(examples):
                first, *second = zip(*(example.texts for example in chunk), strict=True)
                writer.write(tokenise(first, second[0] if second else None, tokenizer, max_length))
                append(labels, [example.label for example in chunk], label)
                bar.update(task, completed=writer.sequences)
        writer.close()
        meta = {
            "examples": writer.sequences,
            "tokens": writer.tokens,
            "truncated": writer.cut,
        }
        write_meta(temporary, meta)


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    source = iter(examples)
    while chunk := list(islice(source, _CHUNK)):
        yield chunk


def _label_dtype(examples: ExampleSource) -> npt.DTypeLike:
    return np.float32 if examples.regression else np.int64
