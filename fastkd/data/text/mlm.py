"""Masked inputs for the `mlm` term, drawn as BERT draws them (arXiv 1810.04805, section 3.1).

A draw is a function of the seed and the step alone and is made for a whole optimiser step: neither
the number of ranks nor the micro-batch changes it, and a resumed run draws it again.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastkd.errors import UserError
from fastkd.types import IGNORE_INDEX

_TO_MASK, _TO_RANDOM = 0.8, 0.1


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
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self.vocabulary = len(tokenizer)
        self.probability = probability
        self.seed = seed

    def __call__(self, ids: Tensor, draw: int | str) -> dict[str, Tensor]:
        """Mask a global batch.

        Args:
            ids: [batch, tokens] int64 on the CPU; left as it is.
            draw: number of the step, or a name.

        Returns:
            `input_ids` and `labels`, both of the same shape; labels are `IGNORE_INDEX` where no
            token was chosen.
        """
        digest = hashlib.sha256(f"{self.seed}/{draw}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        uniform, kind = torch.rand((2, *ids.shape), generator=generator)
        random = torch.randint(self.vocabulary, ids.shape, generator=generator)
        chosen = (uniform < self.probability) & ~torch.isin(ids, self.special)
        masked = torch.where(chosen & (kind < _TO_MASK), self.mask, ids)
        swapped = chosen & (kind >= _TO_MASK) & (kind < _TO_MASK + _TO_RANDOM)
        return {
            "input_ids": torch.where(swapped, random, masked),
            "labels": torch.where(chosen, ids, IGNORE_INDEX),
        }
