"""Tokenised examples, each as long as it is, in flat files that are read memory-mapped.

Padding belongs to a batch, not to an example: what is stored has none, so nothing that is computed
from it can depend on where it was padded to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

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
`labels` [examples], int64 classes or fp32 scores; on the CPU, padded on the right, or packed."""
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
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    """[examples]."""
    pad_id: int
    max_length: int
    """No example is longer, and no batch padded further."""
    fingerprint: str
    """Key of content, tokenizer and settings."""

    def __len__(self) -> int:
        return len(self.labels)

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
        batch["labels"] = self.labels[chosen]
        return {name: torch.from_numpy(value) for name, value in batch.items()}

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
    if not is_complete(folder, "task.cache", build=build):
        if not build:
            raise UserError(
                f"task.cache: {folder} is missing; rank 0 builds it first, so all ranks must see "
                "the same files and the same cache folder"
            )
        _build(folder, examples, tokenizer, max_length, token_types, progress)
    meta = read_meta(folder, "task.cache")
    if meta["truncated"]:
        logger.warning(
            "%d of %d examples are longer than %d tokens and were cut",
            meta["truncated"],
            meta["examples"],
            max_length,
        )
    pad_id = tokenizer.pad_token_id
    return EncodedExamples(
        tokens=open_flat(folder, "tokens", _token_dtype(tokenizer), meta["tokens"]),
        types=open_flat(folder, "types", np.uint8, meta["tokens"]) if token_types else None,
        offsets=open_flat(folder, "offsets", np.int64, meta["examples"] + 1),
        labels=open_flat(folder, "labels", _label_dtype(examples), meta["examples"]),
        # without one of its own any id will do, because it is masked
        pad_id=tokenizer.eos_token_id or 0 if pad_id is None else pad_id,
        max_length=max_length,
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
    meta = {"examples": 0, "tokens": 0, "truncated": 0}
    tokens, label = _token_dtype(tokenizer), _label_dtype(examples)
    with ExitStack() as stack:
        temporary = stack.enter_context(new_folder(folder, "task.cache"))
        bar = stack.enter_context(progress_bar(progress))
        task = bar.add_task("tokenising examples", total=None)
        names = ("tokens", "offsets", "labels", *(["types"] if token_types else []))
        write = {name: stack.enter_context(flat_file(temporary, name).open("wb")) for name in names}
        append(write["offsets"], [0], np.int64)
        for chunk in _chunks(examples):
            ids, types, cut = _tokenise(chunk, tokenizer, max_length)
            ends = meta["tokens"] + np.cumsum([len(row) for row in ids])
            append(write["tokens"], chain.from_iterable(ids), tokens)
            if token_types:
                append(write["types"], chain.from_iterable(types), np.uint8)
            append(write["offsets"], ends, np.int64)
            append(write["labels"], [example.label for example in chunk], label)
            meta["examples"] += len(chunk)
            meta["tokens"] = int(ends[-1])
            meta["truncated"] += cut
            bar.update(task, completed=meta["examples"])
        write_meta(temporary, meta)


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    source = iter(examples)
    while chunk := list(islice(source, _CHUNK)):
        yield chunk


def _tokenise(
    chunk: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """Ids and token types of each example, and how many examples were cut."""
    first, *second = zip(*(example.texts for example in chunk), strict=True)
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
    encoded = tokenizer(
        list(first),
        list(second[0]) if second else None,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=True,
        verbose=False,
    )
    # or an exported tokenizer would cut texts
    tokenizer.backend_tokenizer.no_truncation()
    cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    return encoded["input_ids"], encoded["token_type_ids"], cut


def _token_dtype(tokenizer: PreTrainedTokenizerBase) -> npt.DTypeLike:
    return np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.int32


def _label_dtype(examples: ExampleSource) -> npt.DTypeLike:
    return np.float32 if examples.regression else np.int64
