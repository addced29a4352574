"""The section of the objective: its terms, and what they share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fastkd.recipe.section import Section


class AttentionLoss(Section):
    """Attention of the mapped blocks (TinyBERT, arXiv 1909.10351, eq. 7)."""

    kind: Literal["score_mse"] = "score_mse"
    """Squared difference of the scores before the softmax."""
    weight: float = Field(default=1.0, ge=0)
    """Factor in the total loss."""


class HiddenLoss(Section):
    """Hidden states of the mapped layers (TinyBERT, arXiv 1909.10351, eq. 8)."""

    kind: Literal["mse"] = "mse"
    """Squared difference after the projection."""
    weight: float = Field(default=1.0, ge=0)
    """Factor in the total loss."""


class EmbeddingLoss(HiddenLoss):
    """Embeddings, layer 0 of both models (TinyBERT, arXiv 1909.10351, eq. 9)."""


class Losses(Section):
    """The terms of the objective, and what they share; a term that is absent is off."""

    attention: AttentionLoss | None = None
    """Attention of the mapped blocks."""
    hidden: HiddenLoss | None = None
    """Hidden states of the mapped layers."""
    embedding: EmbeddingLoss | None = None
    """Embedding outputs."""
    reduction: Literal["valid", "tinybert"] = "valid"
    """Means over valid tokens and query-key pairs, or over all as the official TinyBERT code."""
    projection: Literal["auto", "none", "shared", "per_pair"] = "auto"
    """From student to teacher width: one for hidden states and embeddings of all pairs (TinyBERT),
    one a pair, or none; auto is none where the widths agree, else shared."""
    projection_bias: bool = True
    """Whether projections have a bias."""

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if not any((self.attention, self.hidden, self.embedding)):
            raise ValueError("no term is given; expected attention, hidden or embedding")
        return self
