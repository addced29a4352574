"""`losses.embedding`: what enters the first block."""

from __future__ import annotations

from typing import ClassVar

from fastkd.layer_map import Link, Progress
from fastkd.losses.base import Captures, LossGroup
from fastkd.losses.registry import register_loss
from fastkd.losses.states import StateConfig, StateGroup, StateLoss


@register_loss("embedding")
class EmbeddingLayerLoss(StateLoss):
    """Embeddings, layer 0 of both models (TinyBERT, arXiv 1909.10351, eq. 9).

    What enters the first block, compared as `hidden` compares the states of a layer: `mse`,
    `normalized_mse` or `cosine`, through the same projection where the widths differ.
    """

    class Config(StateConfig):
        """Embedding outputs."""

    config: Config
    captures = Captures(hidden=True)
    group: type[LossGroup] | None = StateGroup
    official_kind: ClassVar[str | None] = "mse"

    @property
    def labels(self) -> tuple[str, ...]:
        return ("0-0",)

    def links_at(self, moment: Progress) -> tuple[Link, ...]:
        return (Link(0, (0,)),)
