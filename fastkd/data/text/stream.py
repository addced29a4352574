"""Endless batches in a fixed random order, with a position that can be saved and restored.

A batch is the global batch of one optimiser step. Every rank counts the same one off and makes its
own rows of it, so that neither the number of ranks nor the micro-batch changes what a step sees.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fastkd.data.text.cache import TOKENS
from fastkd.data.text.exchange import Exchange
from fastkd.data.text.packing import IntArray, Packer
from fastkd.data.text.split import Split
from fastkd.data.text.tokenize import Encoder, tokenisers
from fastkd.data.workers import Workers
from fastkd.errors import UserError
from fastkd.seeds import derived_seed

logger = logging.getLogger(__name__)

ALL = slice(None)
CHUNK_CHARACTERS = 1 << 16
"""Text that is tokenised at a time while streaming, at most: some hundredths of a second of work.
"""
SHARE = 2
"""Chunks that each of several ranks tokenises between two exchanges."""


class BlockStream(Protocol):
    """Batches without end; `state_dict` holds plain values and tensors only."""

    @property
    def epoch(self) -> int:
        """Passes over the data that are done."""

    @property
    def numbers(self) -> Tensor | None:
        """Numbers of the blocks that were given last; `None` where blocks are not counted."""

    def next_batch(self, rows: slice = ALL) -> Tensor:
        """Rows of the next global batch, [rows, block_size] int64 on the CPU."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the saved stream stood, whatever this one has read."""

    def close(self) -> None:
        """End what works for the stream; it gives no more batches."""


class ShuffledBlocks:
    """Cached blocks, in a new permutation each epoch; a batch may reach into the next epoch."""

    def __init__(self, blocks: Dataset, batch_size: int, seed: int, fingerprint: str) -> None:
        self._blocks = blocks.with_format("numpy")
        self._batch_size = batch_size
        self._identity = {"fingerprint": fingerprint, "seed": seed}
        self._seed = seed
        self._position = 0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int32)
        self.numbers: Tensor | None = None

    @property
    def epoch(self) -> int:
        return self._position // len(self._blocks)

    def next_batch(self, rows: slice = ALL) -> Tensor:
        parts: list[Tensor] = []
        missing = self._batch_size
        while missing:
            epoch, start = divmod(self._position, len(self._blocks))
            if epoch != self._epoch:
                self._shuffle(epoch)
            parts.append(self._order[start : start + missing])
            missing -= len(parts[-1])
            self._position += len(parts[-1])
        self.numbers = torch.cat(parts)[rows].long()
        numbers = self.numbers.tolist()
        return torch.from_numpy(np.asarray(self._blocks[numbers][TOKENS], dtype=np.int64))

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity, "blocks": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same(state, self._identity)
        self._position = state["blocks"]

    def close(self) -> None:
        """Nothing works for it."""

    def _shuffle(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(derived_seed(self._seed, epoch))
        self._order = torch.randperm(
            len(self._blocks), generator=generator, dtype=torch.int32, device="cpu"
        )
        self._epoch = epoch


class _Chunk(NamedTuple):
    """Documents of one epoch that are tokenised together, and where the stream stands after them.
    A chunk without any is the end of an epoch."""

    tokens: Future[IntArray] | None
    taken: int
    """Documents of the epoch so far, these included."""
    read: str
    """Digest of what was read of the epoch so far."""
    dropped: int
    """Documents of the epoch that were left out so far, because they are held out."""


class _Round(NamedTuple):
    """Chunks of which the ranks tokenise their shares, and what ended it early."""

    chunks: list[_Chunk]
    fault: Exception | None


class StreamedDocuments:
    """Documents read, shuffled in a buffer, tokenised and packed while training.

    The position is the number of documents taken in this epoch and the tokens that no batch has
    used yet. Restoring reads the epoch's text again up to that document, without tokenising: the
    shuffle of `datasets.IterableDataset` would lose the buffer's documents instead. Chunks are read
    ahead where processes or ranks tokenise; the position is that of the chunks that were packed,
    and what goes wrong while reading is raised where its chunk is needed.

    Where a block begins is known once all text before it is tokenised, so every rank reads all
    documents. It tokenises every n-th chunk of n ranks and gets the tokens of the others from them.

    Files that change under a run would change it without a word. So the position also holds what
    was read of this epoch, as a digest, and for the rest the size and the time of every file.
    """

    numbers: Tensor | None = None

    def __init__(
        self,
        split: Split,
        encoder: Encoder,
        packer: Packer,
        batch_size: int,
        buffer_size: int,
        seed: int,
        fingerprint: str,
        workers: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        """Start at the beginning of the order of `seed`.

        Args:
            split: documents to train on.
            encoder: text to tokens.
            packer: tokens to blocks.
            batch_size: blocks of an optimiser step.
            buffer_size: documents that the shuffle holds.
            seed: of the order.
            fingerprint: of content, tokenizer and settings.
            workers: processes that tokenise, started for the first batch; with none, whoever asks
                for a batch does.
            exchange: with the other ranks, all of which make the same calls of this stream; alone
                it tokenises everything. It is closed with the stream.
        """
        self._split = split
        self._encoder = encoder
        self._packer = packer
        self._batch_size = batch_size
        # about one batch: a character is rarely more than a token
        self._chunk = min(CHUNK_CHARACTERS, 4 * batch_size * packer.frame.content)
        self._buffer_size = buffer_size
        self._seed = seed
        self._identity = {"fingerprint": fingerprint, "seed": seed, "buffer": buffer_size}
        self._files = list(split.files())
        self._stamps = [_stamp(path) for path in self._files]
        self._workers = workers
        self._processes: Workers[list[str], IntArray] | None = None
        self._exchange = exchange
        self._rank, self._ranks, self._share = 0, 1, 1
        if exchange is not None:
            self._rank, self._ranks, self._share = exchange.rank, exchange.world_size, SHARE
        self._restart(0, 0)

    def _restart(self, epoch: int, taken: int) -> int:
        """Read from a document of an epoch on; how many documents were there before it."""
        self._epoch = epoch
        self._taken = taken
        self._start_epoch(epoch)
        found = sum(1 for _ in islice(self._documents, taken))
        self._read = self._digest.hexdigest()
        self._chunks = self._tokenised(self._read_chunks(epoch, taken))
        return found

    @property
    def epoch(self) -> int:
        return self._epoch

    def next_batch(self, rows: slice = ALL) -> Tensor:
        while self._packer.available() < self._batch_size:
            chunk = next(self._chunks)
            if chunk.tokens is not None:
                self._packer.add(chunk.tokens.result())
                self._taken, self._read = chunk.taken, chunk.read
            else:
                logger.info(
                    "epoch %d of the stream: %d documents, %d left out that are held out",
                    self._epoch,
                    chunk.taken,
                    chunk.dropped,
                )
                self._epoch += 1
                self._taken, self._read = 0, _new_digest().hexdigest()
        blocks = self._packer.take(self._batch_size)[rows]
        return torch.from_numpy(blocks.astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._identity,
            "epoch": self._epoch,
            "documents": self._taken,
            "read": self._read,
            "files": [list(stamp) for stamp in self._stamps],
            "pending": torch.from_numpy(self._packer.pending.copy()),
            "started": self._packer.started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same(state, self._identity)
        self._require_same_files(state["files"])
        # up to where the saved stream had read
        found = self._restart(state["epoch"], state["documents"])
        if found != self._taken or self._read != state["read"]:
            raise UserError(
                "checkpoint: the text that was read so far has changed since; resume with the data "
                "of that run, or start a new run"
            )
        self._packer.pending = state["pending"].numpy().astype(np.int32)
        self._packer.started = state["started"]

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()
        if self._exchange is not None:
            self._exchange.close()

    def _require_same_files(self, stamps: list[list[int]]) -> None:
        """Raise where a file is another one than when the saved stream was opened."""
        if len(stamps) != len(self._files):
            raise UserError(
                f"checkpoint: its text is in {len(stamps)} files, this run's in "
                f"{len(self._files)}; resume with the data of that run, or start a new run"
            )
        for path, was, now in zip(self._files, stamps, self._stamps, strict=True):
            if tuple(was) != now:
                raise UserError(
                    f"checkpoint: {path} has {now[0]:,} bytes of {_date(now[1])}, but "
                    f"{was[0]:,} of {_date(was[1])} when the run was started; put that file back, "
                    "with its time, or start a new run"
                )

    def _tokenised(self, chunks: Iterator[_Chunk]) -> Iterator[_Chunk]:
        """Chunks with the tokens of all ranks, as many read ahead as the processes can work on."""
        if self._workers and self._processes is None:
            self._processes = tokenisers(self._encoder, self._workers)
        ahead: deque[_Round] = deque()
        while True:
            while len(ahead) * self._share <= 2 * self._workers and not (ahead and ahead[-1].fault):
                ahead.append(_read_round(chunks, self._ranks * self._share))
            current = ahead.popleft()
            fault = current.fault if self._exchange is None else self._shared(current)
            yield from current.chunks
            if fault is not None:
                raise fault

    def _shared(self, current: _Round) -> Exception | None:
        """Exchange the tokens of a round; what ends the text after it, here or on another rank."""
        assert self._exchange is not None
        tokens = [chunk.tokens for chunk in current.chunks if chunk.tokens is not None]
        mine = [_settled(each) for each in tokens[self._rank :: self._ranks]]
        mine += [None] * (self._share - len(mine))
        # the last one says what this rank has read, and that it reads on
        read = None if current.fault else _as_numbers(current.chunks[-1].read)
        found = self._exchange([*mine, read])
        _require_same_text([arrays[-1] for arrays in found])
        for number, each in enumerate(tokens):
            turn, rank = divmod(number, self._ranks)
            array = found[rank][turn]
            if rank == self._rank:
                continue
            if array is None:
                each.set_exception(_rank_failed(rank))
            else:
                each.set_result(array)
        failed = [rank for rank, arrays in enumerate(found) if arrays[-1] is None]
        return current.fault or (_rank_failed(failed[0]) if failed else None)

    def _read_chunks(self, epoch: int, taken: int) -> Iterator[_Chunk]:
        """Chunks without end, from where the documents of an epoch stand."""
        number = 0
        while True:
            while texts := self._next_documents():
                taken += len(texts)
                mine = number % self._ranks == self._rank
                yield self._chunk_of(self._encoded(texts) if mine else Future(), taken)
                number += 1
            if not taken:
                raise UserError("data.train: no document to train on is left after the held-out")
            yield self._chunk_of(None, taken)
            epoch, taken = epoch + 1, 0
            self._start_epoch(epoch)

    def _chunk_of(self, tokens: Future[IntArray] | None, taken: int) -> _Chunk:
        return _Chunk(tokens, taken, self._digest.hexdigest(), self._split.dropped)

    def _encoded(self, texts: list[str]) -> Future[IntArray]:
        if self._processes is not None:
            return self._processes.submit(texts)
        encoded: Future[IntArray] = Future()
        encoded.set_result(self._encoder(texts))
        return encoded

    def _next_documents(self) -> list[str]:
        missing = self._chunk
        texts: list[str] = []
        while missing > 0 and (text := next(self._documents, None)) is not None:
            texts.append(text)
            missing -= 4 + len(text)
        return texts

    def _start_epoch(self, epoch: int) -> None:
        self._split.dropped = 0
        generator = random.Random(derived_seed(self._seed, epoch))
        sources = generator.sample(self._split.train_sources, len(self._split.train_sources))
        self._digest = _new_digest()
        texts = (text for part, text in self._split.labelled(sources) if part == "train")
        self._documents = shuffled(self._noted(texts), self._buffer_size, generator)

    def _noted(self, texts: Iterable[str]) -> Iterator[str]:
        digest = self._digest
        for text in texts:
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
            yield text


def _read_round(chunks: Iterator[_Chunk], count: int) -> _Round:
    """The next chunks, so many with documents, or those before what reading them raises."""
    found: list[_Chunk] = []
    try:
        while count:
            found.append(next(chunks))
            count -= found[-1].tokens is not None
    # raised where its chunk is needed
    except Exception as error:
        return _Round(found, error)
    return _Round(found, None)


def _settled(tokens: Future[IntArray]) -> IntArray | None:
    """What a chunk came to, once that is known; `None` where it failed."""
    return None if tokens.exception() is not None else tokens.result()


def _as_numbers(digest: str) -> IntArray:
    # a copy, which torch may take over
    return np.frombuffer(bytes.fromhex(digest), dtype=np.int32).copy()


def _require_same_text(read: Sequence[IntArray | None]) -> None:
    """Raise where a rank has read other text than the first; of one that failed nothing is said."""
    known = {rank: each.tobytes() for rank, each in enumerate(read) if each is not None}
    first = min(known, default=0)
    for rank, digest in known.items():
        if digest != known[first]:
            raise UserError(
                f"data.train: rank {rank} has read other text than rank {first}; let every machine "
                "see the same files, or copy those of rank 0 to it"
            )


def _rank_failed(rank: int) -> UserError:
    return UserError(
        f"data.train: rank {rank} could not read or tokenise its share of the text; what it says "
        "itself tells why"
    )


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def shuffled(texts: Iterable[str], buffer_size: int, generator: random.Random) -> Iterator[str]:
    """Each text once: a random one of the buffer leaves when the next one comes in."""
    buffer: list[str] = []
    for text in texts:
        if len(buffer) < buffer_size:
            buffer.append(text)
            continue
        slot = generator.randrange(buffer_size)
        yield buffer[slot]
        buffer[slot] = text
    generator.shuffle(buffer)
    yield from buffer


def _stamp(path: Path) -> tuple[int, int]:
    """Bytes of a file, and when it was written, in seconds: archives keep no more."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return status.st_size, int(status.st_mtime)


def _date(seconds: int) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def require_same(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise `UserError` where the position in a checkpoint is that of another order."""
    for name, now in identity.items():
        if state.get(name) != now:
            raise UserError(
                f"checkpoint: its data order has {name} {state.get(name)!r}, this run {now!r}; "
                "resume with the data, tokenizer and seed of that run, or start a new run"
            )
