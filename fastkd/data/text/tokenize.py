"""Tokenising, in this process or in several.

Processes rather than the tokenizer's own threads: turning its results into Python integers holds
the interpreter lock and is as slow as the tokenising. They are forked, so that any tokenizer
works; a batch goes out as text and comes back as one array.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkd.data.text.packing import IntArray
from fastkd.errors import UserError

Part = Literal["train", "heldout"]

BATCH_CHARACTERS = 250_000
"""Text that a process gets at a time, about a fifth of a second of work."""
SMALL_BATCHES = 8
"""Fewer batches than this are not worth starting processes."""


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
        # verbose: a document longer than the model's input is what packing is for
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        flat = chain.from_iterable(chain(self.separator, ids) for ids in encoded)
        return np.fromiter(flat, dtype=np.int32)

    def batch(self, batch: dict[Part, list[str]]) -> list[Encoded]:
        """Encode the two parts of a batch apart."""
        return [Encoded(part, self(texts), len(texts)) for part, texts in batch.items()]


def encode(
    encoder: Encoder, documents: Iterable[tuple[Part, str]], workers: int | None
) -> Iterator[Encoded]:
    """Encode documents in their order; `workers` is one a core where not given."""
    batches = _batches(documents)
    first = list(islice(batches, SMALL_BATCHES))
    workers = workers or _cores()
    if workers == 1 or len(first) < SMALL_BATCHES:
        for batch in chain(first, batches):
            yield from encoder.batch(batch)
    else:
        yield from _encode_in_processes(encoder, chain(first, batches), workers)


def _encode_in_processes(
    encoder: Encoder, batches: Iterable[dict[Part, list[str]]], workers: int
) -> Iterator[Encoded]:
    waiting: deque[Future[list[Encoded]]] = deque()
    with _quiet_fork():
        pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("fork"),
            initializer=_start_worker,
            initargs=(encoder,),
        )
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                # a bounded queue: the reader never runs far ahead of the writer
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"data: one of {workers} tokenising processes was killed, probably for memory; "
                "set data.workers lower"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[tuple[Part, str]]) -> Iterator[dict[Part, list[str]]]:
    batch: dict[Part, list[str]] = {}
    length = 0
    for part, text in documents:
        batch.setdefault(part, []).append(text)
        length += len(text)
        if length >= BATCH_CHARACTERS:
            yield batch
            batch, length = {}, 0
    if batch:
        yield batch


def _cores() -> int:
    """Cores that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Tokenizers warns about a fork after its threads were used, unless told what is wanted."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _work(batch: dict[Part, list[str]]) -> list[Encoded]:
    assert _encoder is not None
    return _encoder.batch(batch)
