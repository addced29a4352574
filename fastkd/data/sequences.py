"""Token sequences, each as long as it is, in flat files that are read memory-mapped.

Padding belongs to a batch, not to a sequence: what is stored has none, so nothing that is computed
from it can depend on where it was padded to. Labelled examples (`tasks`) and rows of texts (`rows`)
are both stored so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase

from fastkd.data.known_ids import check_ids
from fastkd.errors import UserError
from fastkd.files.flat import flat_file, open_flat
from fastkd.types import LENGTHS, STARTS

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask`, perhaps `token_type_ids`, all int64 [sequences, tokens], and what
belongs to them; on the CPU, padded on the right, or packed."""
PAD_MULTIPLE = 8
"""Lengths of batches are rounded up to this, which tensor cores like."""
_TYPES = "token_type_ids"
_TEXTS_AT_ONCE = 2048


@dataclass(frozen=True)
class Sequences:
    """Token ids, special tokens included."""

    tokens: npt.NDArray[Any]
    """[tokens of all sequences] uint16 or int32."""
    types: npt.NDArray[np.uint8] | None
    """[tokens of all sequences] the text that a token belongs to, for models that are told."""
    offsets: npt.NDArray[np.int64]
    """[sequences + 1] where each starts in `tokens`."""
    pad_id: int
    max_length: int
    """No sequence is longer, and no batch padded further."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence, [sequences]."""
        return np.diff(self.offsets)

    def batch(self, rows: Sequence[int], multiple: int = PAD_MULTIPLE) -> Batch:
        """The sequences of the given numbers, in that order, padded to the longest of them.

        Args:
            rows: numbers of sequences, at least one.
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
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def packed(self, rows: Sequence[int]) -> Batch:
        """The sequences of the given numbers, one after another in one row without padding.

        Args:
            rows: numbers of sequences, at least one.

        Returns:
            As `fastkd.packed_row` shows: `input_ids`, `position_ids`, perhaps `token_type_ids`, all
            int64 [1, tokens], where each sequence begins, and all lengths.
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
        row |= {STARTS: starts.astype(np.int32), LENGTHS: lengths}
        return {name: torch.from_numpy(value) for name, value in row.items()}


def padded_length(longest: int, multiple: int, limit: int) -> int:
    """`longest` rounded up to a multiple, but not above `limit`."""
    return min(-(-longest // multiple) * multiple, limit)


def has_token_types(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration can tell the texts of a pair apart by token types."""
    return int(getattr(config, "type_vocab_size", None) or 0) > 1


def uses_token_types(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model is told the texts of a pair apart: it can be, and its tokenizer marks them.

    What a folder says of `model_input_names` decides; the default of a class doesn't, for since
    transformers 5 it leaves types out also where models were trained with them, as ALBERT was.
    """
    if not has_token_types(config):
        return False
    named = tokenizer.init_kwargs.get("model_input_names")
    if named is not None:
        return _TYPES in named
    return any(tokenizer("a", "b", return_token_type_ids=True)[_TYPES])


def name_token_types(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer's folder say that its model is told the texts of a pair apart, so that who
    reads by it does so."""
    if _TYPES not in tokenizer.model_input_names:
        tokenizer.model_input_names = [*tokenizer.model_input_names, _TYPES]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names


class Tokenised(NamedTuple):
    """Sequences on their way to a file."""

    ids: npt.NDArray[np.int32]
    """Token ids of all sequences, one after another."""
    types: npt.NDArray[np.uint8]
    """Type of each of these tokens."""
    lengths: npt.NDArray[np.int64]
    """[sequences]."""
    cut: int
    """Sequences whose texts were longer."""


def tokenise(
    first: Sequence[str],
    second: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    field: str = "max_length",
) -> Tokenised:
    """Texts, or pairs of them, as `frame` frames them."""
    # what a tokenizer gives takes many times the room of the ids that are kept of it
    parts = [
        tokenised(frame(*texts, tokenizer, max_length, field), tokenizer)
        for texts in _chunks(first, second)
    ]
    return Tokenised(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.types for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        sum(part.cut for part in parts),
    )


def _chunks(
    first: Sequence[str], second: Sequence[str] | None
) -> Iterator[tuple[Sequence[str], Sequence[str] | None]]:
    """Texts, or pairs of them, that are framed together."""
    for start in range(0, len(first), _TEXTS_AT_ONCE):
        end = start + _TEXTS_AT_ONCE
        yield first[start:end], None if second is None else second[start:end]


def tokenised(encoded: BatchEncoding, tokenizer: PreTrainedTokenizerBase) -> Tokenised:
    """What a tokenizer made, on its way to a file.

    Raises:
        UserError: ids that the models don't embed.
    """
    ids = encoded["input_ids"]
    flat = _flat(ids, np.int32)
    check_ids(flat, tokenizer)
    return Tokenised(
        flat,
        _flat(encoded["token_type_ids"], np.uint8),
        np.fromiter(map(len, ids), dtype=np.int64),
        sum(bool(encoding.overflowing) for encoding in encoded.encodings),
    )


def frame(
    first: Sequence[str],
    second: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    field: str = "max_length",
    **options: Any,
) -> BatchEncoding:
    """Frame texts, or pairs of them, as a tokenizer frames them.

    Args:
        first: texts.
        second: the other text of each pair, `None` where texts stand alone.
        tokenizer: a fast one.
        max_length: tokens of a sequence, special tokens included; longer ones are cut, the longer
            text of a pair first.
        field: of the recipe, which says how many.
        options: further ones of the tokenizer.

    Raises:
        UserError: a tokenizer that is not fast, or no room for text.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {type(tokenizer).__name__}: not a fast one; give the model's folder a "
            "tokenizer.json"
        )
    special = tokenizer.num_special_tokens_to_add(pair=second is not None)
    if max_length <= special + (second is not None):
        raise UserError(
            f"{field}: {max_length} given, but special tokens take {special} of an example; "
            "give a larger one"
        )
    encoded: BatchEncoding = tokenizer(
        list(first),
        None if second is None else list(second),
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=True,
        verbose=False,
        **{"truncation": True, **options},
    )
    # or an exported tokenizer would cut texts
    tokenizer.backend_tokenizer.no_truncation()
    return encoded


class SequenceWriter:
    """Appends sequences to flat files; what was written is whole once the context is left."""

    def __init__(
        self, folder: Path, dtype: npt.DTypeLike, *, token_types: bool, prefix: str = ""
    ) -> None:
        """Begin with none.

        Args:
            folder: where the files are made.
            dtype: of token ids, see `token_dtype`.
            token_types: whether the model wants them.
            prefix: of the files' names.
        """
        self._dtype = dtype
        self._stack = ExitStack()
        names = ("tokens", "offsets", *(["types"] if token_types else []))
        self._files = {
            name: self._stack.enter_context(flat_file(folder, prefix + name).open("wb"))
            for name in names
        }
        self.sequences = self.tokens = self.cut = 0
        np.zeros(1, np.int64).tofile(self._files["offsets"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the files."""
        self._stack.close()

    def write(self, made: Tokenised) -> None:
        """Append them."""
        made.ids.astype(self._dtype).tofile(self._files["tokens"])
        if "types" in self._files:
            made.types.tofile(self._files["types"])
        (self.tokens + np.cumsum(made.lengths)).tofile(self._files["offsets"])
        self.sequences += len(made.lengths)
        self.tokens += len(made.ids)
        self.cut += made.cut


def open_sequences(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int,
    tokens: int,
    token_types: bool,
    max_length: int,
    field: str,
    prefix: str = "",
) -> Sequences:
    """What a `SequenceWriter` wrote, memory-mapped.

    Args:
        folder: a whole one.
        tokenizer: that made the tokens.
        sequences: how many there are.
        tokens: of all of them.
        token_types: whether they were written.
        max_length: that they were cut to.
        field: of the recipe, which says where the folder is.
        prefix: of the files' names.

    Raises:
        UserError: a file that is not there, or has another size.
    """

    def stored(name: str, dtype: npt.DTypeLike, size: int) -> npt.NDArray[Any]:
        return open_flat(folder, prefix + name, dtype, size, field)

    return Sequences(
        tokens=stored("tokens", token_dtype(tokenizer), tokens),
        types=stored("types", np.uint8, tokens) if token_types else None,
        offsets=stored("offsets", np.int64, sequences + 1),
        pad_id=_padding(tokenizer),
        max_length=max_length,
    )


def sequences_of(
    made: Tokenised, tokenizer: PreTrainedTokenizerBase, *, token_types: bool, max_length: int
) -> Sequences:
    """Sequences in memory, of what `tokenise` made with a tokenizer.

    Args:
        made: all of them.
        tokenizer: that made them.
        token_types: whether the model wants them.
        max_length: that they were cut to.
    """
    return Sequences(
        tokens=made.ids,
        types=made.types if token_types else None,
        offsets=np.concatenate([[0], np.cumsum(made.lengths)]).astype(np.int64),
        pad_id=_padding(tokenizer),
        max_length=max_length,
    )


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id
    # without one of its own any id will do, because it is masked
    return int(tokenizer.eos_token_id or 0 if pad is None else pad)


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> npt.DTypeLike:
    """The smallest of two that holds every id."""
    return np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.int32


def _flat(rows: Sequence[Sequence[int]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype)
