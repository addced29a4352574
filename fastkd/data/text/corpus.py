"""Text, ready to train on."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastkd.data.text.cache import (
    TOKENS,
    BlockWriter,
    cache_key,
    needs_build,
    new_folder,
    open_blocks,
    read_meta,
    tokenizer_digest,
    write_meta,
)
from fastkd.data.text.exchange import Exchange
from fastkd.data.text.files import Source, require_unchanged
from fastkd.data.text.packing import Frame, Packer
from fastkd.data.text.settings import TextSettings
from fastkd.data.text.sources import resolve
from fastkd.data.text.split import Split
from fastkd.data.text.stream import (
    BlockStream,
    ShuffledBlocks,
    StreamedDocuments,
)
from fastkd.data.text.tokenize import Encoder, encode
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.reporting.progress import progress_bar

logger = logging.getLogger(__name__)

_COUNTS = "{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"


@dataclass(frozen=True)
class Corpus:
    """Blocks to train on and blocks to evaluate on. Counts of a streamed corpus are unknown."""

    heldout: Tensor
    """[blocks, block_size] int64 on the CPU, never trained on."""
    train_tokens: int | None
    """Tokens of the training documents, special tokens not counted."""
    train_blocks: int | None
    fingerprint: str
    """Key of the content, the tokenizer and the settings that shape the blocks."""
    digests: dict[str, str]
    """sha256 of the sources of `train` and `heldout` as they are read, in their order; of a stream
    of their sizes and ends alone."""
    _open_stream: Callable[[int, int, Ranks | None], BlockStream] = field(repr=False)

    def stream(self, batch_size: int, seed: int, ranks: Ranks | None = None) -> BlockStream:
        """Global batches of `batch_size` blocks, from the start of the order of `seed`.

        Args:
            batch_size: blocks of an optimiser step.
            seed: of the order.
            ranks: which open this stream together and take the same batches of it, so that each
                tokenises a part of what is streamed; alone where not given.
        """
        return self._open_stream(batch_size, seed, ranks)


def prepare_corpus(
    data: TextSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    build: bool = True,
    progress: bool = True,
) -> Corpus:
    """Read, split, tokenise and pack text, or open what an earlier run stored.

    With several ranks the first one calls this alone; the others call it afterwards with
    `build=False`, which opens the cache and raises `UserError` where there is none.
    """
    frame = Frame.of(tokenizer, data.block_size)
    # a thread streams beside whoever else calls the tokenizer, and calls set it up, each its way
    own = copy.deepcopy(tokenizer) if data.streaming else tokenizer
    encoder = Encoder(own, frame.separator)
    train = resolve(data.train, data)
    heldout = None if data.heldout is None else resolve(data.heldout, data, heldout=True)
    split = Split(data, train, heldout)
    settings: dict[str, Any] = {
        "train": _digests(train, data),
        "heldout": None if heldout is None else _digests(heldout, data),
        "heldout_fraction": data.heldout_fraction if heldout is None else None,
        "tokenizer": tokenizer_digest(tokenizer),
        "frame": [frame.prefix, frame.suffix, frame.separator, frame.block_size],
    }
    key = cache_key(settings)
    digests = {part: _joined(settings[part]) for part in ("train", "heldout") if settings[part]}
    unchanged = partial(
        require_unchanged,
        [*train, *(heldout or ())],
        [*settings["train"], *(settings["heldout"] or ())],
        quick=data.streaming,
    )
    if data.streaming:
        corpus = _streamed(data, split, encoder, frame, key, digests)
        unchanged()
        return corpus
    folder = data.cache_root / key
    if needs_build(folder, build=build):
        _build(folder, data, split, encoder, frame, progress, unchanged)
    return _open(folder, data, key, digests)


def _digests(sources: list[Source], data: TextSettings) -> list[str]:
    # a stream starts at once: it is not read through beforehand
    return [source.digest(quick=data.streaming) for source in sources]


def _joined(digests: list[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _open(folder: Path, data: TextSettings, key: str, digests: dict[str, str]) -> Corpus:
    meta = read_meta(folder)
    train = open_blocks(folder, "train.arrow", meta["train_blocks"])
    heldout = open_blocks(folder, "heldout.arrow", meta["heldout_blocks"])
    if meta["dropped"]:
        logger.warning("%d training documents are also held out: not trained on", meta["dropped"])
    # spread over all of the held-out text, which may have several sources
    rows = np.linspace(0, len(heldout) - 1, min(len(heldout), data.heldout_blocks)).astype(int)
    tokens = heldout.with_format("numpy")[rows.tolist()][TOKENS]
    return Corpus(
        heldout=torch.from_numpy(np.asarray(tokens, dtype=np.int64)),
        train_tokens=meta["train_tokens"],
        train_blocks=meta["train_blocks"],
        fingerprint=key,
        digests=digests,
        _open_stream=lambda batch_size, seed, _: ShuffledBlocks(train, batch_size, seed, key),
    )


def _build(
    folder: Path,
    data: TextSettings,
    split: Split,
    encoder: Encoder,
    frame: Frame,
    progress: bool,
    unchanged: Callable[[], None],
) -> None:
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    largest_id = max(encoder.tokenizer.get_vocab().values())
    packers = {part: Packer(frame) for part in ("train", "heldout")}
    with new_folder(folder) as temporary, progress_bar(progress, _COUNTS) as bar:
        writers = {
            part: BlockWriter(temporary / f"{part}.arrow", frame.block_size, largest_id)
            for part in packers
        }
        task = bar.add_task("tokenising", total=None, documents=0, tokens=0)
        for part, ids, count in encode(encoder, split.documents(), data.workers):
            packer = packers[part]
            packer.add(ids)
            writers[part].write(packer.take(packer.available()))
            documents[part] += count
            tokens[part] += ids.size - count * len(frame.separator)
            bar.update(task, documents=documents.total(), tokens=tokens.total())
        for writer in writers.values():
            writer.close()
        meta = {
            "train_documents": documents["train"],
            "train_tokens": tokens["train"],
            "train_blocks": writers["train"].blocks,
            "heldout_documents": documents["heldout"],
            "heldout_tokens": tokens["heldout"],
            "heldout_blocks": writers["heldout"].blocks,
            "dropped": split.dropped,
        }
        _require_blocks(meta, data)
        # the folder's name says what was there before the first word was read
        unchanged()
        write_meta(temporary, meta)


def _require_blocks(meta: dict[str, int], data: TextSettings) -> None:
    """Raise where there is nothing to train on or nothing to evaluate on."""
    documents = meta["train_documents"] + meta["heldout_documents"]
    tokens = meta["train_tokens"] + meta["heldout_tokens"]
    if meta["heldout_blocks"] and (meta["train_blocks"] or not data.train):
        return
    none = documents == 0 or (data.heldout and not meta["train_documents"] + meta["dropped"])
    if data.train and none:
        raise _no_text("data.train", data.train)
    if data.heldout is not None and meta["heldout_documents"] == 0:
        raise _no_text("data.heldout", data.heldout)
    if tokens < data.block_size:
        field = "data.train" if data.train else "data.heldout"
        raise UserError(
            f"{field}: {tokens} tokens in all, less than one block of data.block_size "
            f"{data.block_size}; give more text or smaller blocks"
        )
    if data.heldout is None:
        advice = "name other text in data.heldout, change data.heldout_fraction"
        if data.documents == "paragraph":
            advice += ", or set data.documents to line if every line stands alone"
        share = f"{documents} documents, of which {meta['heldout_documents']} are held out"
    else:
        advice = "give more text"
        share = f"{documents} documents, of which {meta['heldout_documents']} in data.heldout"
        if meta["dropped"]:
            share += f", and {meta['dropped']} more in data.train that equal one of those"
    part = "train on" if meta["train_blocks"] == 0 else "evaluate on"
    raise UserError(
        f"data: not one block of {data.block_size} tokens to {part}: {share} "
        f"({meta['train_tokens']} tokens to train on, {meta['heldout_tokens']} held out); {advice}"
    )


def _has_text(sources: list[Source]) -> bool:
    return any(True for _ in chain.from_iterable(source.documents() for source in sources))


def _no_text(field: str, names: Sequence[str]) -> UserError:
    return UserError(f"{field}: {', '.join(names)}: no text in it; give files that hold documents")


def _streamed(
    data: TextSettings,
    split: Split,
    encoder: Encoder,
    frame: Frame,
    key: str,
    digests: dict[str, str],
) -> Corpus:
    packer = Packer(frame)
    documents = 0
    for text in split.heldout():
        if packer.available() < data.heldout_blocks:
            packer.add(encoder([text]))
            documents += 1
        elif data.heldout is None:
            break
    if documents == 0 and data.heldout is not None:
        raise _no_text("data.heldout", data.heldout)
    asked = data.train and (documents == 0 or data.heldout is not None)
    if asked and not _has_text(split.train_sources):
        raise _no_text("data.train", data.train)
    if packer.available() == 0:
        raise UserError(
            f"data: {documents} held-out documents have {packer.pending.size} tokens, less than "
            f"one block of {data.block_size}; name text in data.heldout, raise "
            "data.heldout_fraction, or set data.documents to line"
        )
    heldout = packer.take(min(packer.available(), data.heldout_blocks))

    def open_stream(batch_size: int, seed: int, ranks: Ranks | None) -> BlockStream:
        return StreamedDocuments(
            split,
            encoder,
            Packer(frame),
            batch_size,
            data.shuffle_buffer,
            seed,
            key,
            data.workers or 0,
            Exchange(ranks) if ranks is not None and ranks.world_size > 1 else None,
        )

    return Corpus(
        heldout=torch.from_numpy(heldout.astype(np.int64)),
        train_tokens=None,
        train_blocks=None,
        fingerprint=key,
        digests=digests,
        _open_stream=open_stream,
    )
