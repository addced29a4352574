"""Tokenised examples, each as long as it is, in flat files that are read memory-mapped.

Padding belongs to a batch, not to an example: what is stored has none, so nothing that is computed
from it can depend on where it was padded to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase

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
from fastkd.types import LENGTHS, STARTS

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask`, perhaps `token_type_ids`, all int64 [examples, tokens], and
`labels` [examples], int64 classes or fp32 scores, or int64 [examples, tokens]; on the CPU, padded
on the right, or packed."""
PAD_MULTIPLE = 8
"""Lengths of batches are rounded up to this, which tensor cores like."""
_CHUNK = 2048
_FORMAT = 1


@dataclass(frozen=True)
class EncodedExamples:
    """Token ids of examples, special tokens included."""

    tokens: npt.NDArray[Any]
    """[tokens of all examples] uint16 or int32."""
    types: npt.NDArray[np.uint8] | None
    """[tokens of all examples] the text that a token belongs to, for models that are told."""
    offsets: npt.NDArray[np.int64]
    """[examples + 1] where each starts in `tokens`."""
    labels: npt.NDArray[np.integer] | npt.NDArray[np.float32]
    """[examples], or [tokens of all examples] where tokens have labels."""
    pad_id: int
    max_length: int
    """No example is longer, and no batch padded further."""
    fingerprint: str
    """Key of content, tokenizer and settings."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, [examples]."""
        return np.diff(self.offsets)

    def batch(self, rows: Sequence[int], multiple: int = PAD_MULTIPLE) -> Batch:
        """The examples of the given numbers, in that order, padded to the longest of them.

        Args:
            rows: numbers of examples, at least one.
            multiple: the length is rounded up to a multiple of this, up to `max_length`.
        """
        chosen = np.asarray(rows)
        starts, lengths = self.offsets[chosen], self.lengths[chosen]
        width = padded_length(int(lengths.max()), multiple, self.max_length)
        places = np.arange(width)
        mask = places < lengths[:, None]
        stored = (starts[:, None] + places)[mask]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        ids[mask] = self.tokens[stored]
        batch: dict[str, npt.NDArray[Any]] = {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int64),
        }
        if self.types is not None:
            batch["token_type_ids"] = np.zeros_like(ids)
            batch["token_type_ids"][mask] = self.types[stored]
        batch["labels"] = self._labels_of(chosen, mask, stored)
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _labels_of(
        self,
        chosen: npt.NDArray[np.int64],
        mask: npt.NDArray[np.bool_],
        stored: npt.NDArray[np.int64],
    ) -> npt.NDArray[Any]:
        """Labels of a batch: of the chosen examples, whose tokens are `stored` and stand where the
        mask is true."""
        return self.labels[chosen]

    def packed(self, rows: Sequence[int]) -> Batch:
        """The examples of the given numbers, one after another in one row without padding.

        Args:
            rows: numbers of examples, at least one.

        Returns:
            As `fastkd.packed_row` shows: `input_ids`, `position_ids`, perhaps `token_type_ids`, all
            int64 [1, tokens], where each example begins, all lengths, and `labels` [examples].
        """
        chosen = np.asarray(rows)
        lengths = self.lengths[chosen]
        ends = np.cumsum(lengths)
        starts = np.concatenate([[0], ends])
        positions = np.arange(ends[-1]) - np.repeat(starts[:-1], lengths)
        stored = positions + np.repeat(self.offsets[chosen], lengths)
        row: dict[str, npt.NDArray[Any]] = {
            "input_ids": self.tokens[stored].astype(np.int64)[None],
            "position_ids": positions[None],
        }
        if self.types is not None:
            row["token_type_ids"] = self.types[stored].astype(np.int64)[None]
        row |= {STARTS: starts.astype(np.int32), LENGTHS: lengths, "labels": self.labels[chosen]}
        return {name: torch.from_numpy(value) for name, value in row.items()}


class Beside(NamedTuple):
    """A file of numbers that are stored beside the tokens."""

    dtype: npt.DTypeLike
    per_token: bool = False
    """Whether it holds one a token, or one an example."""


class Tokenised(NamedTuple):
    """Some examples as rows of tokens."""

    ids: Sequence[Sequence[int]]
    types: Sequence[Sequence[int]]
    beside: Mapping[str, Iterable[int | float]]
    """By file, the numbers of all of them one after another."""
    cut: int
    """How many were too long."""


class Form(Protocol):
    """How examples of one kind become rows of tokens, and what is stored beside these."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What of it decides what is stored."""

    @property
    def files(self) -> Mapping[str, Beside]:
        """What is stored beside tokens, token types and offsets; `labels` are among it."""

    def tokenise(
        self, chunk: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Tokenised:
        """Rows of some examples; a tokenizer that cuts texts is left as it came."""

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
    ) -> Tokenised:
        ids, types, cut = _tokenise(chunk, tokenizer, max_length)
        return Tokenised(ids, types, {"labels": [example.label for example in chunk]}, cut)

    def opened(
        self, found: EncodedExamples, beside: Mapping[str, npt.NDArray[Any]]
    ) -> EncodedExamples:
        return found


def padded_length(longest: int, multiple: int, limit: int) -> int:
    """`longest` rounded up to a multiple, but not above `limit`."""
    return min(-(-longest // multiple) * multiple, limit)


def uses_token_types(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration tells the texts of a pair apart by token types."""
    return int(getattr(config, "type_vocab_size", None) or 0) > 1


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
    folder = Path(cache).expanduser() / key
    if not is_complete(folder, "task.cache", build=build):
        if not build:
            raise UserError(
                f"task.cache: {folder} is missing; rank 0 builds it first, so all ranks must see "
                "the same files and the same cache folder"
            )
        _build(folder, examples, tokenizer, max_length, token_types, progress, form)
    meta = read_meta(folder, "task.cache")
    if meta["truncated"]:
        logger.warning(
            "%d of %d examples are longer than %d tokens and were cut",
            meta["truncated"],
            meta["examples"],
            max_length,
        )
    pad_id = tokenizer.pad_token_id
    beside = {
        name: open_flat(folder, name, of.dtype, meta["tokens" if of.per_token else "examples"])
        for name, of in form.files.items()
    }
    found = EncodedExamples(
        tokens=open_flat(folder, "tokens", _token_dtype(tokenizer), meta["tokens"]),
        types=open_flat(folder, "types", np.uint8, meta["tokens"]) if token_types else None,
        offsets=open_flat(folder, "offsets", np.int64, meta["examples"] + 1),
        labels=beside["labels"],
        # without one of its own any id will do, because it is masked
        pad_id=tokenizer.eos_token_id or 0 if pad_id is None else pad_id,
        max_length=max_length,
        fingerprint=key,
    )
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
    meta = {"examples": 0, "tokens": 0, "truncated": 0}
    tokens = _token_dtype(tokenizer)
    with ExitStack() as stack:
        temporary = stack.enter_context(new_folder(folder, "task.cache"))
        bar = stack.enter_context(progress_bar(progress))
        task = bar.add_task("tokenising examples", total=None)
        names = ("tokens", "offsets", *form.files, *(["types"] if token_types else []))
        write = {name: stack.enter_context(flat_file(temporary, name).open("wb")) for name in names}
        append(write["offsets"], [0], np.int64)
        for chunk in _chunks(examples):
            found = form.tokenise(chunk, tokenizer, max_length)
            ends = meta["tokens"] + np.cumsum([len(row) for row in found.ids])
            append(write["tokens"], chain.from_iterable(found.ids), tokens)
            if token_types:
                append(write["types"], chain.from_iterable(found.types), np.uint8)
            append(write["offsets"], ends, np.int64)
            for name, of in form.files.items():
                append(write[name], found.beside[name], of.dtype)
            meta["examples"] += len(found.ids)
            meta["tokens"] = int(ends[-1])
            meta["truncated"] += found.cut
            bar.update(task, completed=meta["examples"])
        write_meta(temporary, meta)


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    source = iter(examples)
    while chunk := list(islice(source, _CHUNK)):
        yield chunk


def _tokenise(
    chunk: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """Ids and token types of each example, and how many examples were cut."""
    encoded = cut_texts([example.texts for example in chunk], tokenizer, max_length)
    cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    return encoded["input_ids"], encoded["token_type_ids"], cut


def cut_texts(
    texts: Sequence[tuple[str, ...]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    **options: Any,
) -> BatchEncoding:
    """Texts or pairs of texts as tokens, cut to a length.

    Args:
        texts: as many in each.
        tokenizer: is left as it came.
        max_length: tokens, special ones included.
        options: further ones of the tokenizer.

    Raises:
        UserError: the tokenizer is no fast one, or there is no room for text.
    """
    first, *second = zip(*texts, strict=True)
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {type(tokenizer).__name__}: not a fast one; give the model's folder a "
            "tokenizer.json"
        )
    special = tokenizer.num_special_tokens_to_add(pair=bool(second))
    if max_length <= special + len(second):
        raise UserError(
            f"max_length: {max_length} given, but special tokens take {special} of an example; "
            "give a larger one"
        )
    encoded: BatchEncoding = tokenizer(
        list(first),
        list(second[0]) if second else None,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=True,
        verbose=False,
        **{"truncation": True, **options},
    )
    # or an exported tokenizer would cut texts
    tokenizer.backend_tokenizer.no_truncation()
    return encoded


def _token_dtype(tokenizer: PreTrainedTokenizerBase) -> npt.DTypeLike:
    return np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.int32
