"""`losses.logits`: what the models' heads give."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from fastkd_kernels import LogitsDivergenceKind, logits_divergence
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from fastkd.errors import UserError
from fastkd.layer_map import LayerMap
from fastkd.layer_map.sections import Temperature
from fastkd.losses.base import LossConfig, Shared
from fastkd.losses.counts import Divisor
from fastkd.losses.heads import LANGUAGE_MODELS, Output, SoftLoss
from fastkd.losses.registry import register_loss
from fastkd.types import Head

# a mixture's smaller part, unless it is left out altogether
LEAST_SHARE = 1e-4


def _one_word(kind: object) -> object:
    # what recipes called it before attention and logits had one word for it
    return "cross_entropy" if kind == "soft_ce" else kind


@register_loss("logits")
class LogitsLoss(SoftLoss):
    """Divergence of the outputs of the models' heads (Hinton et al., arXiv 1503.02531; TinyBERT,
    arXiv 1909.10351, eq. 10)."""

    class Config(LossConfig):
        """Outputs of the heads."""

        kind: Annotated[LogitsDivergenceKind, BeforeValidator(_one_word)] = "kl"
        """Divergence of the probabilities, or the squared difference of the logits."""
        temperature: Temperature = 1.0
        """What both models' logits are divided by; `mse` compares raw logits."""
        scale_by_temperature: bool = False
        """Multiply by the temperature squared, so that gradients keep their size (arXiv
        1503.02531)."""
        beta: float = Field(default=0.5, ge=0, le=1)
        """Share of the teacher in the mixture of `js`; as in GKD (arXiv 2306.13649), 0 is `kl` and
        1 is `reverse_kl`."""
        skew: float = Field(default=0.1, ge=0, le=1.0 - LEAST_SHARE)
        """Share of the teacher in the student's mixture of `skew_kl` (DistiLLM, arXiv 2402.03898);
        0 is `kl`."""

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            for field, kind in (("beta", "js"), ("skew", "skew_kl")):
                default = type(self).model_fields[field].default
                if self.kind != kind and getattr(self, field) != default:
                    raise ValueError(f"{field} is read by {kind} only; kind is {self.kind}")
            if self.beta not in (0.0, 1.0) and not LEAST_SHARE <= self.beta <= 1.0 - LEAST_SHARE:
                raise ValueError(_near_an_end("beta", self.beta, "0 or 1"))
            if self.skew != 0.0 and self.skew < LEAST_SHARE:
                raise ValueError(_near_an_end("skew", self.skew, "0"))
            if self.kind == "mse" and self.temperature != 1.0:
                raise ValueError(
                    "temperature is given, but mse compares raw logits; leave it out, or give "
                    "another kind"
                )
            return self

    config: Config
    heads: ClassVar[tuple[Head, ...]] = ("sequence_classification", "causal_lm", "masked_lm")

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        super().__init__(name, config, layer_map, shared)
        kind, pair = self.config.kind, shared.pair
        if pair.outputs == 1 and pair.head not in LANGUAGE_MODELS and kind != "mse":
            raise UserError(
                f"losses.{name}.kind is {kind}, but the models' heads give one number, which has "
                "no probabilities; set it to mse"
            )

    @property
    def mean_over(self) -> Divisor:  # type: ignore[override]
        return "rows" if self.shared.pair.head in LANGUAGE_MODELS else "examples"

    def divergence(
        self, student: Output, teacher: Output, mask: Tensor | None, labels: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        config = self.config
        return logits_divergence(
            student,
            teacher,
            kind=config.kind,
            temperature=config.temperature,
            scale_by_temperature=config.scale_by_temperature,
            beta=config.beta,
            skew=config.skew,
            mask=mask,
            labels=labels,
        )


def _near_an_end(field: str, share: float, ends: str) -> str:
    return (
        f"{field} is {share}, so near an end of the mixture that fp32 loses the smaller part; "
        f"expected {ends}, or {LEAST_SHARE:g} to {1.0 - LEAST_SHARE:g}"
    )
