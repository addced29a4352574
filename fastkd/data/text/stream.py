"""Endless batches in a fixed random order, with a position that can be saved and restored.

A batch is the global batch of one optimiser step. Every rank reads the same one and takes its own
rows, so that neither the number of ranks nor the micro-batch changes what a step sees.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fastkd.data.text.cache import TOKENS
from fastkd.data.text.packing import Packer
from fastkd.data.text.split import Split
from fastkd.data.text.tokenize import Encoder
from fastkd.errors import UserError

logger = logging.getLogger(__name__)


class BlockStream(Protocol):
    """Batches without end; `state_dict` holds plain values and tensors only."""

    @property
    def epoch(self) -> int:
        """Passes over the data that are done."""

    @property
    def numbers(self) -> Tensor | None:
        """Numbers of the last batch's blocks among all; `None` where they are not counted."""

    def next_batch(self) -> Tensor:
        """The next global batch, [batch_size, block_size] int64 on the CPU."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the saved stream stood, whatever this one has read."""


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

    def next_batch(self) -> Tensor:
        rows: list[int] = []
        while len(rows) < self._batch_size:
            epoch, start = divmod(self._position, len(self._blocks))
            if epoch != self._epoch:
                self._shuffle(epoch)
            taken = self._order[start : start + self._batch_size - len(rows)].tolist()
            rows += taken
            self._position += len(taken)
        self.numbers = torch.tensor(rows)
        return torch.from_numpy(np.asarray(self._blocks[rows][TOKENS], dtype=np.int64))

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity, "blocks": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same(state, self._identity)
        self._position = state["blocks"]

    def _shuffle(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(epoch_seed(self._seed, epoch))
        self._order = torch.randperm(
            len(self._blocks), generator=generator, dtype=torch.int32, device="cpu"
        )
        self._epoch = epoch


class StreamedDocuments:
    """Documents read, shuffled in a buffer, tokenised and packed while training.

    The position is the number of documents taken in this epoch and the tokens that no batch has
    used yet. Restoring reads the epoch's text again up to that document, without tokenising: the
    shuffle of `datasets.IterableDataset` would lose the buffer's documents instead.

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
    ) -> None:
        self._split = split
        self._encoder = encoder
        self._packer = packer
        self._batch_size = batch_size
        self._buffer_size = buffer_size
        self._seed = seed
        self._identity = {"fingerprint": fingerprint, "seed": seed, "buffer": buffer_size}
        self._files = list(split.files())
        self._stamps = [_stamp(path) for path in self._files]
        self._epoch = 0
        self._taken = 0
        self._documents = self._read_epoch()

    @property
    def epoch(self) -> int:
        return self._epoch

    def next_batch(self) -> Tensor:
        while self._packer.available() < self._batch_size:
            texts = self._next_documents()
            if texts:
                self._packer.add(self._encoder(texts))
            elif self._taken:
                logger.info(
                    "epoch %d of the stream: %d documents, %d left out that are held out",
                    self._epoch,
                    self._taken,
                    self._split.dropped,
                )
                self._epoch += 1
                self._taken = 0
                self._documents = self._read_epoch()
            else:
                raise UserError("data.train: no document to train on is left after the held-out")
        blocks = self._packer.take(self._batch_size)
        return torch.from_numpy(blocks.astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._identity,
            "epoch": self._epoch,
            "documents": self._taken,
            "read": self._read.hexdigest(),
            "files": [list(stamp) for stamp in self._stamps],
            "pending": torch.from_numpy(self._packer.pending.copy()),
            "started": self._packer.started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same(state, self._identity)
        self._epoch = state["epoch"]
        self._taken = state["documents"]
        self._require_same_files(state["files"])
        self._documents = self._read_epoch()
        # up to where the saved stream had read
        found = sum(1 for _ in islice(self._documents, self._taken))
        if found != self._taken or self._read.hexdigest() != state["read"]:
            raise UserError(
                "checkpoint: the text that was read so far has changed since; resume with the data "
                "of that run, or start a new run"
            )
        self._packer.pending = state["pending"].numpy().astype(np.int32)
        self._packer.started = state["started"]

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

    def _next_documents(self) -> list[str]:
        """Documents for about one batch: a character is rarely more than a token."""
        missing = self._batch_size * self._packer.frame.content - self._packer.pending.size
        texts: list[str] = []
        while missing > 0 and (text := next(self._documents, None)) is not None:
            texts.append(text)
            missing -= 1 + len(text) // 4
        self._taken += len(texts)
        return texts

    def _read_epoch(self) -> Iterator[str]:
        self._split.dropped = 0
        generator = random.Random(epoch_seed(self._seed, self._epoch))
        sources = generator.sample(self._split.train_sources, len(self._split.train_sources))
        self._read = hashlib.blake2b(digest_size=16)
        texts = (text for part, text in self._split.labelled(sources) if part == "train")
        return shuffled(self._noted(texts), self._buffer_size, generator)

    def _noted(self, texts: Iterable[str]) -> Iterator[str]:
        digest = self._read
        for text in texts:
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
            yield text


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


def epoch_seed(seed: int, epoch: int) -> int:
    """Unrelated for every pair, where seed + epoch would repeat orders across seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8]) >> 1


def require_same(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise `UserError` where the position in a checkpoint is that of another order."""
    for name, now in identity.items():
        if state.get(name) != now:
            raise UserError(
                f"checkpoint: its data order has {name} {state.get(name)!r}, this run {now!r}; "
                "resume with the data, tokenizer and seed of that run, or start a new run"
            )
