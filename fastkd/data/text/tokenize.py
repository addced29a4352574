"""Tokenising, in this process or in several.

Processes rather than the tokenizer's own threads: turning its results into Python integers holds
the interpreter lock and is as slow as the tokenising. A batch goes out as text and comes back as
one array.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastkd.data.known_ids import check_ids
from fastkd.data.text.packing import IntArray
from fastkd.data.workers import Workers
from fastkd.limits import cores

A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")
Part = Literal["train", "heldout"]

BATCH_CHARACTERS = 250_000
"""Text that a process gets at a time, about a fifth of a second of work."""
SMALL_BATCHES = 8
"""Fewer batches than this are not worth starting processes."""
STREAM_WORKERS = 4
"""Processes of a rank that streams, at most, where a recipe doesn't say how many."""


class Encoded(NamedTuple):
    """Tokens of some documents, each with the separator in front."""

    part: Part
    ids: IntArray
    documents: int


@dataclass(frozen=True)
class Encoder:
    """Text to tokens, without special tokens other than the separator before each document."""

    tokenizer: PreTrainedTokenizerBase
    separator: tuple[int, ...]

    def __call__(self, texts: Sequence[str]) -> IntArray:
        documents = self._without_places(texts) if self._is_plain else self._ids(texts)
        flat = chain.from_iterable(chain(self.separator, ids) for ids in documents)
        ids = np.fromiter(flat, dtype=np.int32)
        check_ids(ids, self.tokenizer)
        return ids

    @property
    def _is_plain(self) -> bool:
        """Whether all that this tokenizer does to text is done by its backend."""
        kind = type(self.tokenizer)
        return (
            issubclass(kind, PreTrainedTokenizerFast)
            and kind.__call__ is PreTrainedTokenizerFast.__call__
            and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        )

    def _ids(self, texts: Sequence[str]) -> Iterable[list[int]]:
        # verbose: a document longer than the model's input is what packing is for
        encoded: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return encoded

    def _without_places(self, texts: Sequence[str]) -> Iterable[list[int]]:
        """Ids of each text without the places of its tokens, which take a fifth of the time."""
        # sets the backend up, whoever used it last
        self._ids([""])
        backend = self.tokenizer.backend_tokenizer
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return (each.ids for each in encoded)

    def batch(self, batch: dict[Part, list[str]]) -> list[Encoded]:
        """Encode the two parts of a batch apart."""
        return [Encoded(part, self(texts), len(texts)) for part, texts in batch.items()]


def encode(
    encoder: Encoder, documents: Iterable[tuple[Part, str]], workers: int | None
) -> Iterator[Encoded]:
    """Encode documents in their order; `workers` is one a core where not given, 0 for none."""
    batches = parted(documents, len)
    return chain.from_iterable(in_order(encoder.batch, batches, workers))


def in_order(
    function: Callable[[A], R], batches: Iterable[A], workers: int | None = None
) -> Iterator[R]:
    """Call a function that tokenises on batches, and give what it made in their order.

    Args:
        function: of a batch.
        batches: of about `BATCH_CHARACTERS` each.
        workers: processes; one a core where not given, 0 for none.
    """
    batches = iter(batches)
    first = list(islice(batches, SMALL_BATCHES))
    workers = cores() if workers is None else workers
    if workers == 0 or len(first) < SMALL_BATCHES:
        yield from map(function, chain(first, batches))
    else:
        yield from _in_processes(function, chain(first, batches), workers)


def tokenisers(function: Callable[[A], R], count: int) -> Workers[A, R]:
    """Processes that call a function which tokenises."""
    return Workers(
        function,
        count,
        f"data: one of {count} tokenising processes was killed, probably for memory; set "
        "data.workers lower",
        f"data.workers: the system does not start {count} tokenising processes; set it lower, or "
        "raise the limit of processes (ulimit -u, or that of the container)",
    )


def stream_workers(ranks: int) -> int:
    """Processes that tokenise for each of the ranks of this machine while they train: a core of
    every rank's is left to the rank itself."""
    return max(0, min(STREAM_WORKERS, cores() // ranks - 1))


def parted(
    texts: Iterable[tuple[Part, T]], characters: Callable[[T], int]
) -> Iterator[dict[Part, list[T]]]:
    """Batches of texts, the parts of each apart; `characters` says how many a text has."""
    for batch in batched(texts, lambda each: characters(each[1])):
        apart: dict[Part, list[T]] = {}
        for part, text in batch:
            apart.setdefault(part, []).append(text)
        yield apart


def batched(texts: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Batches of texts that a process gets at a time; `characters` says how many one has."""
    batch: list[T] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += characters(text)
        if length >= BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _in_processes(function: Callable[[A], R], batches: Iterable[A], workers: int) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    with closing(tokenisers(function, workers)) as processes:
        for batch in batches:
            waiting.append(processes.submit(batch))
            # a bounded queue: the reader never runs far ahead of the writer
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
