"""Rows of texts, tokenised once and stored by content: the part to train on and the held-out one.

Which rows are held out is decided by their first text, as documents are by theirs: the answer is
the same in every run and for every tokenizer, and no query falls on both sides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from fastkd.data.rows.read import TextRow, read_rows
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
from fastkd.data.text.cache import (
    cache_key,
    needs_build,
    new_folder,
    read_meta,
    tokenizer_digest,
    write_meta,
)
from fastkd.data.text.files import Source, require_unchanged
from fastkd.data.text.settings import TextSettings
from fastkd.data.text.sources import resolve
from fastkd.data.text.split import content_hash, is_held_out
from fastkd.data.text.tokenize import Part, in_order, parted
from fastkd.errors import UserError
from fastkd.files.flat import flat_file, open_flat
from fastkd.reporting.progress import progress_bar
from fastkd.row_form import RowForm
from fastkd.types import SCORES, TEACHER

logger = logging.getLogger(__name__)

PARTS: tuple[Part, ...] = ("train", "heldout")
_FORMAT = 1
_FIELD = "data.cache"


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What `prepare_rows` is asked for."""

    text: TextSettings
    """Where rows are read from, which are held out, and how long a sequence may be: its
    `block_size`."""
    form: RowForm
    token_types: bool
    """Whether the model tells the texts of a pair apart by token types."""


@dataclass(frozen=True)
class EncodedRows:
    """Rows as models read them."""

    sequences: Sequences
    """Row `r`'s from `r * each` on."""
    each: int
    """Sequences of a row."""
    scores: npt.NDArray[np.float32] | None
    """[rows, candidates], where the data has some."""
    fingerprint: str
    """Key of content, tokenizers and settings."""
    teacher: Sequences | None = None
    """Sequences of the same texts by a tokenizer of the teacher's own."""

    def __len__(self) -> int:
        return len(self.sequences) // self.each

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of the longest sequence of each row, by either tokenizer, [rows]."""
        lengths = self.sequences.lengths
        if self.teacher is not None:
            lengths = np.maximum(lengths, self.teacher.lengths)
        longest: npt.NDArray[np.int64] = lengths.reshape(-1, self.each).max(axis=1)
        return longest

    def numbers(self, rows: Sequence[int]) -> npt.NDArray[np.int64]:
        """Numbers of the sequences of some rows, in order."""
        firsts = np.asarray(rows, dtype=np.int64) * self.each
        numbers: npt.NDArray[np.int64] = (firsts[:, None] + np.arange(self.each)).reshape(-1)
        return numbers

    def batch(self, rows: Sequence[int], multiple: int = PAD_MULTIPLE) -> Batch:
        """Rows of the given numbers, in that order, padded to the longest sequence.

        Args:
            rows: at least one.
            multiple: the length is rounded up to a multiple of this, up to the longest allowed.

        Returns:
            What `Sequences.batch` gives, [rows * each, tokens], and `scores`, fp32 [rows,
            candidates], where there are some; under names that begin with `teacher.` what a
            teacher with a tokenizer of its own reads.
        """
        numbers = self.numbers(rows).tolist()
        batch = self.sequences.batch(numbers, multiple)
        if self.scores is not None:
            batch[SCORES] = torch.from_numpy(self.scores[np.asarray(rows)])
        if self.teacher is not None:
            read = self.teacher.batch(numbers, multiple)
            batch |= {TEACHER + name: tensor for name, tensor in read.items()}
        return batch


class RowSets(NamedTuple):
    """What a data set is split into."""

    train: EncodedRows
    heldout: EncodedRows

    @property
    def sequences(self) -> list[Sequences]:
        """Sequences of both sets."""
        return [part.sequences for part in self]

    def padded_with(self, pad: int) -> RowSets:
        """These rows, padded with another id."""
        return RowSets(
            *(replace(rows, sequences=replace(rows.sequences, pad_id=pad)) for rows in self)
        )

    def with_teacher(self, teacher: RowSets) -> RowSets:
        """These rows, with what a tokenizer of the teacher's own made of them."""
        return RowSets(
            *(
                replace(
                    rows,
                    teacher=theirs.sequences,
                    fingerprint=f"{rows.fingerprint} {theirs.fingerprint}",
                )
                for rows, theirs in zip(self, teacher, strict=True)
            )
        )


def prepare_rows(
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    build: bool = True,
    progress: bool = True,
) -> RowSets:
    """Read, split and tokenise rows, or open what an earlier run stored.

    With several ranks the first one calls this alone; the others call it afterwards with
    `build=False`, which opens the cache and raises `UserError` where there is none.

    Args:
        settings: what is read, and how.
        tokenizer: of the model.
        build: whether to make what is not there.
        progress: whether to show a bar.

    Raises:
        UserError: rows that can't be read, none to train on or to hold out, or a cache that can't
            be read or written.
    """
    data, form = settings.text, settings.form
    train = resolve(data.train, data)
    heldout = None if data.heldout is None else resolve(data.heldout, data, heldout=True)
    read: dict[str, Any] = {
        "rows": _FORMAT,
        "train": [source.digest(quick=False) for source in train],
        "heldout": None if heldout is None else [s.digest(quick=False) for s in heldout],
        "heldout_fraction": data.heldout_fraction if heldout is None else None,
        "columns": form.columns,
        "sentences": form.sentences,
        "candidates": form.candidates,
        "scores": form.scores,
        "prompts": form.prompt_of,
        "paired": form.paired,
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": data.block_size,
        "token_types": settings.token_types,
    }
    key = cache_key(read)
    # rows of their own are the same whatever is trained on
    keys = key, key if heldout is None else cache_key(read | {"train": []})
    folder = data.cache_root / key
    if needs_build(folder, _FIELD, build=build):
        split = _Split(form, train, heldout, data.heldout_fraction)
        encoder = RowEncoder(tokenizer, form, data.block_size)
        unchanged = partial(
            require_unchanged,
            [*train, *(heldout or ())],
            [*read["train"], *(read["heldout"] or ())],
            quick=False,
        )
        _build(folder, settings, split, encoder, progress, unchanged)
    return _open(folder, settings, tokenizer, keys)


class _Split:
    """Rows with the part that each belongs to; those to train on that are also in `data.heldout`
    are left out, and counted."""

    def __init__(
        self,
        form: RowForm,
        train: Sequence[Source],
        heldout: Sequence[Source] | None,
        fraction: float,
    ) -> None:
        self._form = form
        self._train = train
        self._heldout = heldout
        self._fraction = fraction
        self.dropped = 0
        self._parts: set[Part] = set()
        self.firsts: set[bytes] = set()
        """Hashes of all first texts, as long as they are of one part."""

    def __iter__(self) -> Iterator[tuple[Part, TextRow]]:
        known = set()
        for row in read_rows(self._heldout or (), self._form):
            known.add(_content(row))
            yield "heldout", row
        for row in read_rows(self._train, self._form):
            if self._heldout is None:
                yield self._part(row.texts[0]), row
            elif _content(row) in known:
                self.dropped += 1
            else:
                yield "train", row

    def _part(self, first: str) -> Part:
        """Which part the rows with a first text belong to."""
        part: Part = "heldout" if is_held_out(first, self._fraction) else "train"
        self._parts.add(part)
        if len(self._parts) == 1:
            self.firsts.add(content_hash(first))
        return part


def _content(row: TextRow) -> bytes:
    return b"".join(map(content_hash, row.texts))


class _Encoded(NamedTuple):
    part: Part
    made: Tokenised
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowEncoder:
    """Rows to token ids, framed as a tokenizer frames texts and pairs."""

    tokenizer: PreTrainedTokenizerBase
    form: RowForm
    max_length: int

    def __call__(self, rows: Sequence[TextRow]) -> Tokenised:
        """The sequences of some rows, in order."""
        prompts = self.form.prompt_of
        texts = [[p + t for p, t in zip(prompts, row.texts, strict=True)] for row in rows]
        if self.form.paired:
            first = [text for text, *others in texts for _ in others]
            second = [other for _, *others in texts for other in others]
            return tokenise(first, second, self.tokenizer, self.max_length, "data.block_size")
        single = [text for row in texts for text in row]
        return tokenise(single, None, self.tokenizer, self.max_length, "data.block_size")

    def batch(self, parts: dict[Part, list[TextRow]]) -> list[_Encoded]:
        """Encode the parts of a batch apart."""
        return [
            _Encoded(part, self(rows), np.asarray([row.scores for row in rows], np.float32))
            for part, rows in parts.items()
        ]


def _build(
    folder: Path,
    settings: RowSettings,
    split: _Split,
    encoder: RowEncoder,
    progress: bool,
    unchanged: Callable[[], None],
) -> None:
    kind, data = token_dtype(encoder.tokenizer), settings.text
    with ExitStack() as stack:
        temporary = stack.enter_context(new_folder(folder, _FIELD))
        bar = stack.enter_context(progress_bar(progress))
        task = bar.add_task("tokenising rows", total=None)
        writers = {
            part: stack.enter_context(
                SequenceWriter(temporary, kind, token_types=settings.token_types, prefix=f"{part}_")
            )
            for part in PARTS
        }
        scores = {
            part: stack.enter_context(flat_file(temporary, f"{part}_scores").open("wb"))
            for part in PARTS
            if settings.form.scores
        }
        batches = parted(split, lambda row: row.characters)
        for part, made, of_rows in chain.from_iterable(
            in_order(encoder.batch, batches, data.workers)
        ):
            writers[part].write(made)
            if scores:
                of_rows.tofile(scores[part])
            bar.update(task, completed=sum(writer.sequences for writer in writers.values()))
        for writer in writers.values():
            writer.close()
        for file in scores.values():
            file.close()
        meta = {"dropped": split.dropped}
        for part, writer in writers.items():
            meta[f"{part}_sequences"] = writer.sequences
            meta[f"{part}_tokens"] = writer.tokens
            meta[f"{part}_cut"] = writer.cut
        _require_rows(meta, settings, len(split.firsts))
        # the folder's name says what was there before the first row was read
        unchanged()
        write_meta(temporary, meta)


def _require_rows(meta: dict[str, int], settings: RowSettings, firsts: int) -> None:
    """Raise where there is nothing to train on or nothing to evaluate on.

    Args:
        meta: counts of what was written.
        settings: what was asked for.
        firsts: different first texts of the rows, where these are all of one part.
    """
    data, form = settings.text, settings.form
    train, heldout = meta["train_sequences"], meta["heldout_sequences"]
    if heldout and (train or not data.train):
        return
    of_train = train + meta["dropped"] + (heldout if data.heldout is None else 0)
    if data.train and not of_train:
        raise UserError(f"data.train: {', '.join(data.train)}: no rows in it; give some")
    if data.heldout is not None and not heldout:
        raise UserError(f"data.heldout: {', '.join(data.heldout)}: no rows in it; give some")
    if meta["dropped"]:
        raise UserError(
            f"data.train: all {meta['dropped']} rows are also in data.heldout; give others"
        )
    side = "to train on" if not train else "held out"
    rows = (train + heldout) // len(form.sequences)
    by, more = "their text", "rows"
    if len(form.columns) > 1:
        by = f"the first of data.columns, {form.columns[0]!r}"
        more = "rows that differ in it, another first column"
    raise UserError(
        f"data.train: no row is {side} where data.heldout_fraction is {data.heldout_fraction:g}: "
        f"rows are split by {by}, with {firsts:,} different in {rows:,} rows; give more {more}, "
        "another fraction, or data.heldout"
    )


def _open(
    folder: Path, settings: RowSettings, tokenizer: PreTrainedTokenizerBase, keys: tuple[str, str]
) -> RowSets:
    meta, each = read_meta(folder), len(settings.form.sequences)
    if meta["dropped"]:
        logger.warning("%d rows to train on are also held out: left out", meta["dropped"])
    cut = sum(meta[f"{part}_cut"] for part in PARTS)
    if cut:
        logger.warning(
            "%d of %d sequences are longer than %d tokens and were cut",
            cut,
            sum(meta[f"{part}_sequences"] for part in PARTS),
            settings.text.block_size,
        )

    def part(name: Part, key: str) -> EncodedRows:
        count = meta[f"{name}_sequences"]
        return EncodedRows(
            sequences=open_sequences(
                folder,
                tokenizer,
                sequences=count,
                tokens=meta[f"{name}_tokens"],
                token_types=settings.token_types,
                max_length=settings.text.block_size,
                field=_FIELD,
                prefix=f"{name}_",
            ),
            each=each,
            scores=_open_scores(folder, name, count // each, settings.form.scored),
            fingerprint=key,
        )

    return RowSets(part("train", keys[0]), part("heldout", keys[1]))


def _open_scores(
    folder: Path, part: Part, rows: int, scored: int
) -> npt.NDArray[np.float32] | None:
    if not scored:
        return None
    stored: npt.NDArray[Any] = open_flat(
        folder, f"{part}_scores", np.float32, rows * scored, _FIELD
    )
    return stored.reshape(rows, scored)
