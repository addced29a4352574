"""`losses.relations`: how queries, keys and values of a layer relate to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import torch
from fastkd_kernels import AttentionReduction, relation_divergence
from pydantic import Field, model_validator
from torch import Tensor

from fastkd.layer_map import LayerMap
from fastkd.layer_map.sections import Layers, Temperature
from fastkd.losses.base import Batch, Captures, Loss, LossConfig, LossInfo, Shared
from fastkd.losses.comparable import (
    DivergenceKind,
    States,
    by_window,
    check_blend,
    check_directions,
    check_links,
    check_visible,
)
from fastkd.losses.counts import Divisor
from fastkd.losses.registry import register_loss
from fastkd.losses.relation_heads import check_relation_heads
from fastkd.losses.temperature import check_temperatures, temperature_at
from fastkd.recipe.weights import Schedule
from fastkd.section import MOST_HEADS

if TYPE_CHECKING:
    from fastkd.capture import AttentionTraits, Capture

Relation = Literal["qq", "kk", "vv", "qk"]


@register_loss("relations")
class RelationsLoss(Loss):
    """Divergence of relations among queries, keys and values (MiniLM, arXiv 2002.10957; MiniLMv2,
    arXiv 2012.15828, eq. 5 to 7).

    All heads of a layer are put side by side and cut anew into `relation_heads` r, so that models
    with other numbers of heads compare. A relation of X and Y is, for each of them,

        softmax(X_r Y_r^T / sqrt(width / relation_heads) / temperature)

    and the student's is compared with the teacher's row by row, as `attention` compares
    probabilities. Each relation is logged apart: `relations.vv/3-6`.
    """

    class Config(LossConfig):
        """Query, key and value relations of the mapped blocks."""

        relations: tuple[Relation, ...] = Field(default=("qq", "kk", "vv"), min_length=1)
        """Which vectors are multiplied with which: queries, keys, values."""
        relation_heads: int | None = Field(default=None, gt=0, le=MOST_HEADS)
        """Heads that the vectors are cut into anew; the teacher's attention heads where not
        given."""
        kind: DivergenceKind = "kl"
        """Divergence of the relations' softmax."""
        temperature: Temperature = 1.0
        """What the relations are divided by before the softmax."""
        temperature_schedule: Schedule | None = None
        """Factor on it over the run; not any where not given. Held-out losses have the first."""
        mean_over: AttentionReduction = "tokens"
        """A mean over all tokens of a step that are no padding, or over its sequences of the mean
        of each, as MiniLMv2's own code has it."""
        layer_map: Layers | None = None
        """Mapping of this term; the recipe's where not given."""

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            check_temperatures(self.temperature, self.temperature_schedule, None)
            if len(set(self.relations)) < len(self.relations):
                raise ValueError(
                    f"relations names one twice (given {', '.join(self.relations)}); name each "
                    "once and give the term a weight"
                )
            return self

    config: Config
    captures = Captures(attention=True)

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        super().__init__(name, config, layer_map, shared)
        check_blend(self, averages=False)
        self.relation_heads = self.config.relation_heads or shared.pair.heads[1]
        check_links(self, sinks=False)
        check_relation_heads(self.config.relations, self.relation_heads, shared.pair.shapes)

    @classmethod
    def check_models(
        cls,
        name: str,
        config: LossConfig,
        heads: tuple[int, int],
        traits: tuple[AttentionTraits, AttentionTraits],
    ) -> None:
        check_directions(name, traits)
        check_visible(
            traits,
            f"give losses.attention the kind score_mse, and leave losses.{name} out",
        )

    @property
    def mean_over(self) -> Divisor:  # type: ignore[override]
        return "rows" if self.config.mean_over == "tokens" else "examples"

    @property
    def matches(self) -> tuple[LossInfo, ...]:
        return tuple(
            LossInfo(self.name, f"{self.name}.{relation}", label, self.mean_over, mapped=True)
            for relation in self.config.relations
            for label in self.labels
        )

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """Losses [relations * links], fp32."""
        losses = []
        temperature = temperature_at(
            self.config.temperature, self.config.temperature_schedule, self.done
        )
        for relation in self.config.relations:

            def divergence(
                student_states: States,
                teacher_states: States,
                window: int | None,
                relation: Relation = relation,
            ) -> Tensor:
                return relation_divergence(
                    student_states,
                    teacher_states,
                    relation=relation,
                    relation_heads=self.relation_heads,
                    kind=self.config.kind,
                    temperature=temperature,
                    key_mask=batch.mask,
                    query_mask=batch.mask,
                    causal=self.shared.pair.causal,
                    window=window,
                    reduction=self.config.mean_over,
                )

            losses.append(by_window(self, student, teacher, divergence))
        return torch.cat(losses)
