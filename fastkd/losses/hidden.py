"""`losses.hidden`: states that the mapped blocks hand on."""

from __future__ import annotations

from typing import ClassVar

from fastkd.layer_map.sections import Layers
from fastkd.losses.base import Captures, LossGroup
from fastkd.losses.registry import register_loss
from fastkd.losses.states import StateConfig, StateGroup, StateLoss


@register_loss("hidden")
class HiddenLoss(StateLoss):
    """Hidden states of the mapped layers (TinyBERT, arXiv 1909.10351, eq. 8)."""

    class Config(StateConfig):
        """Hidden states of the mapped layers."""

        layer_map: Layers | None = None
        """Mapping of this term; the recipe's where not given."""

    config: Config
    captures = Captures(hidden=True)
    group: ClassVar[type[LossGroup] | None] = StateGroup
    official_kind: ClassVar[str | None] = "mse"
