"""`losses.attention`: attention scores, or the probabilities that are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from fastkd_kernels import AttentionReduction, attention_divergence, attention_score_mse
from pydantic import model_validator
from torch import Tensor

from fastkd.errors import UserError
from fastkd.layer_map import LayerMap
from fastkd.layer_map.sections import Layers, Temperature
from fastkd.losses.base import Batch, Captures, Loss, LossConfig, Shared
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
from fastkd.losses.temperature import check_temperatures, temperature_at
from fastkd.recipe.weights import Schedule

if TYPE_CHECKING:
    from fastkd.capture import AttentionTraits, Capture


@register_loss("attention")
class AttentionLoss(Loss):
    """Attention of the mapped blocks: mean squared difference of the scores (TinyBERT, arXiv
    1909.10351, eq. 7), or a divergence of their softmax (MiniLM, arXiv 2002.10957).

    Of a head, A = scale Q K^T are the scores, t and p the softmax of the teacher's and the
    student's over the temperature; heads are compared one by one, in their order.

        score_mse      mean over heads and query-key pairs of (A_student - A_teacher)^2
        kl             sum over keys of t log(t / p), mean over heads and queries
        cross_entropy  - sum of t log p
        reverse_kl     sum of p log(p / t)
        js             (KL(t, m) + KL(p, m)) / 2, m = (p + t) / 2
        mse            sum of (p - t)^2
        cosine         1 - cos(p, t)

    Keys that a query does not see are left out. No attention map is stored.
    """

    class Config(LossConfig):
        """Attention of the mapped blocks."""

        kind: Literal["score_mse"] | DivergenceKind = "score_mse"
        """Squared difference of the scores before the softmax, or a divergence of the
        probabilities."""
        temperature: Temperature = 1.0
        """What both models' scores are divided by before the softmax."""
        temperature_schedule: Schedule | None = None
        """Factor on it over the run; not any where not given. Held-out losses have the first."""
        mean_over: AttentionReduction = "tokens"
        """A mean over all tokens of a step that are no padding, or over its sequences of the mean
        of each, as MiniLMv2's own code has it."""
        layer_map: Layers | None = None
        """Mapping of this term; the recipe's where not given."""

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            no_softmax = "score_mse has no softmax" if self.kind == "score_mse" else None
            check_temperatures(self.temperature, self.temperature_schedule, no_softmax)
            if self.kind == "score_mse" and self.mean_over != "tokens":
                raise ValueError(
                    f"mean_over is {self.mean_over}, but score_mse is a mean over query-key pairs; "
                    "leave it out, or give another kind"
                )
            return self

    config: Config
    captures = Captures(attention=True, values=False)
    official_kind: ClassVar[str | None] = "score_mse"

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        super().__init__(name, config, layer_map, shared)
        check_blend(self, averages=self.config.kind == "score_mse")
        if self.config.kind != "score_mse":
            check_links(self, sinks=True)

    @classmethod
    def check_models(
        cls,
        name: str,
        config: LossConfig,
        heads: tuple[int, int],
        traits: tuple[AttentionTraits, AttentionTraits],
    ) -> None:
        assert isinstance(config, cls.Config)
        if heads[0] != heads[1]:
            raise UserError(
                f"losses.{name} compares heads one by one, but the student has {heads[0]} and the "
                f"teacher {heads[1]}; set student.heads={heads[1]}, or leave the term out"
            )
        check_directions(name, traits)
        if config.kind == "score_mse":
            return
        scores = f"give losses.{name} the kind score_mse"
        check_visible(traits, f"{scores}, and leave losses.relations out")
        for found in traits:
            if found.differs:
                raise UserError(
                    f"{found.differs}, so probabilities can't be compared; {scores}, or take "
                    "losses.relations in its place"
                )

    @property
    def mean_over(self) -> Divisor:  # type: ignore[override]
        if self.config.kind == "score_mse":
            return "pairs"
        return "rows" if self.config.mean_over == "tokens" else "examples"

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """Losses [links], fp32."""
        if self.config.kind != "score_mse":
            return self._of_probabilities(self.config.kind, student, teacher, batch)
        states, reduction = teacher.attention, self.shared.reduction
        several = any(len(link.teachers) > 1 for link in self.links)
        shares = [[1 / len(link.teachers)] * len(link.teachers) for link in self.links]
        return attention_score_mse(
            [student.attention[link.student] for link in self.links],
            [
                [states[t] for t in link.teachers] if several else states[link.teachers[0]]
                for link in self.links
            ],
            teacher_weights=shares if several else None,
            key_mask=batch.mask,
            query_mask=batch.mask if reduction == "valid" else None,
            causal=self.shared.pair.causal,
            reduction=reduction,
        )

    def _of_probabilities(
        self, kind: DivergenceKind, student: Capture, teacher: Capture, batch: Batch
    ) -> Tensor:
        temperature = temperature_at(
            self.config.temperature, self.config.temperature_schedule, self.done
        )

        def divergence(
            student_states: States, teacher_states: States, window: int | None
        ) -> Tensor:
            return attention_divergence(
                student_states,
                teacher_states,
                kind=kind,
                temperature=temperature,
                key_mask=batch.mask,
                query_mask=batch.mask,
                causal=self.shared.pair.causal,
                window=window,
                reduction=self.config.mean_over,
            )

        return by_window(self, student, teacher, divergence)
