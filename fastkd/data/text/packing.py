"""Blocks without padding: documents in one stream of tokens, cut at a fixed length.

    prefix | content of block 0 | suffix   prefix | content of block 1 | suffix   ...

The separator stands between documents. Prefix and suffix are what the tokenizer puts around one
sequence, found by asking it, so that a block looks to the model like any input of that tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fastkd.data.known_ids import check_ids
from fastkd.errors import UserError

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Frame:
    """Special tokens of a block and between documents, and how many tokens a block has."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: tuple[int, ...]
    block_size: int

    @property
    def content(self) -> int:
        """Tokens of text in a block."""
        return self.block_size - len(self.prefix) - len(self.suffix)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Frame:
        """Probe the tokenizer with one short text."""
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        if not bare or not starts:
            raise UserError(
                f"tokenizer {type(tokenizer).__name__}: gives {bare} for 'a' and {full} with "
                "special tokens; expected the first inside the second"
            )
        separator = tokenizer.sep_token_id
        if separator is None:
            separator = tokenizer.eos_token_id
        frame = cls(
            prefix=tuple(full[: starts[0]]),
            suffix=tuple(full[starts[0] + len(bare) :]),
            separator=() if separator is None else (separator,),
            block_size=block_size,
        )
        check_ids(np.array([*frame.prefix, *frame.suffix]), tokenizer)
        if frame.content < 1:
            raise UserError(
                f"data.block_size: {block_size} given, but this tokenizer's special tokens take "
                f"{len(frame.prefix) + len(frame.suffix)} of a block; give a larger one"
            )
        return frame


class Packer:
    """Takes tokens of documents, gives full blocks; keeps what does not fill one yet."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._parts: list[IntArray] = []
        self._size = 0
        self.started = False

    @property
    def pending(self) -> IntArray:
        """Tokens that no block has taken."""
        # joined when they are asked for: many documents make a block
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.empty(0, dtype=np.int32), *self._parts])]
        return self._parts[0]

    @pending.setter
    def pending(self, tokens: IntArray) -> None:
        self._parts, self._size = [tokens], tokens.size

    def add(self, ids: IntArray) -> None:
        """Append documents, each with the separator in front of it (see `Encoder`)."""
        if not self.started and ids.size:
            # nothing stands before the very first document
            ids = ids[len(self.frame.separator) :]
            self.started = True
        self._parts.append(ids)
        self._size += ids.size

    def available(self) -> int:
        """Full blocks that `take` could give."""
        return int(self._size // self.frame.content)

    def take(self, count: int) -> IntArray:
        """The next `count` blocks, [count, block_size]."""
        content, start = self.frame.content, len(self.frame.prefix)
        blocks = np.empty((count, self.frame.block_size), dtype=np.int32)
        blocks[:, :start] = self.frame.prefix
        blocks[:, start : start + content] = self.pending[: count * content].reshape(count, content)
        blocks[:, start + content :] = self.frame.suffix
        self.pending = self.pending[count * content :]
        return blocks
