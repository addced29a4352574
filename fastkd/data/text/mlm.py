"""Masked inputs for the `mlm` term, drawn as BERT draws them (arXiv 1810.04805, section 3.1).

A token's draw is a function of the seed, the step, and its row and place in the global batch, and
of nothing else: a rank draws for its own rows what it would draw for all, however a step is cut,
and a resumed run draws it again. That is what a generator with a counter is for: Philox (Salmon et
al., SC11), keyed by seed and step, whose counter says the row. The road not taken: a generator for
each row, whose making takes longer than its drawing.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastkd.data.known_ids import drawn_below
from fastkd.errors import UserError
from fastkd.types import IGNORE_INDEX

_TO_MASK, _TO_RANDOM = 0.8, 0.1
_WORDS = 4
"""Random words of 64 bits that Philox gives for one value of its counter."""
_HALF = 1 << 32


class Masking:
    """Replaces a share of the tokens, and keeps what stood there as labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> None:
        """Look up the tokenizer's special tokens.

        Args:
            tokenizer: of both models.
            probability: share of the tokens that is chosen, special ones left out.
            seed: of the draws.

        Raises:
            UserError: the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise UserError(
                "losses.mlm masks tokens, but the teacher's tokenizer has no mask token; give a "
                "masked language model, or leave losses.mlm out"
            )
        self.mask: int = tokenizer.mask_token_id
        self.special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        self.vocabulary = drawn_below(tokenizer)
        self.probability = probability
        self.seed = seed

    def __call__(self, ids: Tensor, draw: int | str, first: int = 0) -> dict[str, Tensor]:
        """Mask rows of a global batch that follow each other.

        Args:
            ids: [rows, tokens] int64 on the CPU; left as it is.
            draw: number of the step, or a name.
            first: number of the first row in the global batch.

        Returns:
            `input_ids` and `labels`, both of the same shape; labels are `IGNORE_INDEX` where no
            token was chosen.
        """
        tokens = ids.numpy()
        words = self._words(draw, first, *tokens.shape)
        chosen = (words >> np.uint64(32)) < np.uint64(round(self.probability * _HALF))
        # elsewhere nothing is looked up: few are chosen
        places = np.nonzero(chosen & ~np.isin(tokens, self.special))
        was = tokens[places]
        inputs, labels = tokens.copy(), np.full_like(tokens, IGNORE_INDEX)
        labels[places] = was
        inputs[places] = self._replaced(was, words[places] & np.uint64(_HALF - 1))
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def _words(self, draw: int | str, first: int, rows: int, tokens: int) -> npt.NDArray[np.uint64]:
        """A random word for each token, [rows, tokens]; of one row, the same whatever is before."""
        key = hashlib.sha256(f"{self.seed}/{draw}".encode()).digest()[:16]
        counts = -(-tokens // _WORDS)
        generator = np.random.Philox(key=int.from_bytes(key), counter=first * counts)
        words = generator.random_raw(rows * counts * _WORDS)
        return words.reshape(rows, counts * _WORDS)[:, :tokens]

    def _replaced(
        self, tokens: npt.NDArray[np.int64], kinds: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.int64]:
        """What stands in the place of chosen tokens, by a random number below 2^32 for each."""
        masked, swapped = round(_TO_MASK * _HALF), round(_TO_RANDOM * _HALF)
        # of the numbers that swap, as many for each token, up to one in 2^32 / 10 / vocabulary
        drawn = (kinds - np.uint64(masked)) * np.uint64(self.vocabulary) // np.uint64(swapped)
        swaps = (kinds >= masked) & (kinds < masked + swapped)
        replaced = np.where(swaps, drawn.astype(np.int64), tokens)
        return np.where(kinds < masked, self.mask, replaced)
