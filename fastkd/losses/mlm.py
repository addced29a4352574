"""`losses.mlm`: masked tokens; `fastkd.data.text.mlm` masks them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fastkd.head_spec import heads_of_loss
from fastkd.losses.base import LossConfig
from fastkd.losses.heads import HardLoss
from fastkd.losses.registry import register_loss
from fastkd.types import Head


@register_loss("mlm")
class MlmLoss(HardLoss):
    """Cross-entropy of masked tokens (BERT, arXiv 1810.04805, section 3.1).

    The student alone: - log p of the token that stood at each masked place, a mean over those.
    Both models read the masked text, so that `logits` compares what they predict of it.
    """

    class Config(LossConfig):
        """Masked tokens."""

        probability: float = Field(default=0.15, gt=0, lt=1)
        """Share of the tokens that is masked: 80 % become the mask, 10 % a random token, 10 %
        stay."""

    config: Config
    heads: ClassVar[tuple[Head, ...]] = heads_of_loss("mlm")
