"""`losses.logits`: what the models' heads give."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from fastkd_kernels import LogitsDivergenceKind, logits_divergence
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from fastkd.errors import UserError
from fastkd.head_spec import HEADS, heads_of_loss
from fastkd.layer_map import LayerMap
from fastkd.layer_map.sections import Temperature
from fastkd.losses.base import LossConfig, Setting, Shared
from fastkd.losses.counts import Divisor
from fastkd.losses.heads import Output, SoftLoss, labels_count
from fastkd.losses.registry import register_loss
from fastkd.losses.temperature import check_temperatures, temperature_at
from fastkd.recipe.weights import Schedule
from fastkd.types import Head

# a mixture's smaller part, unless it is left out altogether
LEAST_SHARE = 1e-4


def _one_word(kind: object) -> object:
    # what recipes called it before attention and logits had one word for it
    return "cross_entropy" if kind == "soft_ce" else kind


@register_loss("logits")
class LogitsLoss(SoftLoss):
    """Divergence of the outputs of the models' heads (Hinton et al., arXiv 1503.02531; TinyBERT,
    arXiv 1909.10351, eq. 10).

    t and p are the softmax of the teacher's and the student's logits z over the temperature:

        kl               sum over classes of t log(t / p)
        cross_entropy    - sum of t log p
        reverse_kl       sum of p log(p / t)
        js               beta KL(t, m) + (1 - beta) KL(p, m), m = beta t + (1 - beta) p
        skew_kl          KL(t, m), m = skew t + (1 - skew) p
        total_variation  sum of |p - t| / 2
        mse              mean over classes of (z_student - z_teacher)^2

    Of a language model classes are tokens, and its logits are never stored whole.
    """

    class Config(LossConfig):
        """Outputs of the heads."""

        kind: Annotated[
            LogitsDivergenceKind | Literal["total_variation"], BeforeValidator(_one_word)
        ] = "kl"
        """Divergence of the probabilities, or the squared difference of the logits;
        `total_variation`, half the sum of absolute differences, of classification heads only."""
        temperature: Temperature = 1.0
        """What both models' logits are divided by; `mse` compares raw logits."""
        temperature_schedule: Schedule | None = None
        """Factor on it over the run; not any where not given. Held-out losses have the first."""
        scale_by_temperature: bool = False
        """Multiply by the temperature squared, so that gradients keep their size (arXiv
        1503.02531)."""
        standardize: bool = False
        """Give each example's logits mean 0 and standard deviation 1 first (Sun et al., arXiv
        2403.01427, eq. 13); of classification heads only."""
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
            raw = "mse compares raw logits" if self.kind == "mse" else None
            check_temperatures(self.temperature, self.temperature_schedule, raw)
            return self

    config: Config
    heads: ClassVar[tuple[Head, ...]] = heads_of_loss("logits")

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        super().__init__(name, config, layer_map, shared)
        kind, pair = self.config.kind, shared.pair
        if pair.outputs == 1 and not HEADS[pair.head].language_model and kind != "mse":
            raise UserError(
                f"losses.{name}.kind is {kind}, but the models' heads give one number, which has "
                "no probabilities; set it to mse"
            )
        independent = next(filter(None, pair.no_classes), None)
        if independent is not None and (kind != "mse" or self.config.standardize):
            given = f"kind is {kind}" if kind != "mse" else "standardize is on"
            raise UserError(
                f"losses.{name}: {given}, which is of classes that exclude each other, but the "
                f"problem_type of the models' heads is {independent}; take kind: mse without "
                "standardize"
            )
        if pair.outputs == 1 and self.config.standardize:
            raise UserError(
                f"losses.{name}.standardize is on, but the models' heads give one number, which "
                "has no deviation; leave it out"
            )

    @classmethod
    def check_setting(cls, name: str, config: LossConfig, setting: Setting) -> None:
        super().check_setting(name, config, setting)
        assert isinstance(config, cls.Config)
        if HEADS[setting.head].labels == "span" and config.standardize:
            raise ValueError(
                f"losses.{name} has standardize, which is for logits of classes, but "
                f"{setting.field} is {setting.head}; leave it out"
            )
        if HEADS[setting.head].language_model:
            for field, given in (
                ("kind: total_variation", config.kind == "total_variation"),
                ("standardize", config.standardize),
            ):
                if given:
                    raise ValueError(
                        f"losses.{name} has {field}, which is computed for sequence_classification "
                        f"heads only, but {setting.field} is {setting.head}; leave it out"
                    )

    @property
    def raw(self) -> bool:
        return self.config.kind == "mse"

    @property
    def mean_over(self) -> Divisor:  # type: ignore[override]
        head = self.shared.pair.head
        if labels_count(head):
            return "labels"
        return "predictions" if HEADS[head].language_model else "examples"

    def divergence(
        self, student: Output, teacher: Output, mask: Tensor | None, labels: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        config, kind = self.config, self.config.kind
        temperature = temperature_at(config.temperature, config.temperature_schedule, self.done)
        if config.standardize:
            student, teacher = standardized(student), standardized(teacher)
        if kind == "total_variation":
            found = total_variation(student, teacher, temperature, mask)
            return found * temperature**2 if config.scale_by_temperature else found
        return logits_divergence(
            student,
            teacher,
            kind=kind,
            temperature=temperature,
            scale_by_temperature=config.scale_by_temperature,
            beta=config.beta,
            skew=config.skew,
            mask=mask,
            labels=labels,
        )


def standardized(logits: Output) -> Tensor:
    """Logits [..., classes] less their mean, over their standard deviation (arXiv 2403.01427)."""
    assert isinstance(logits, Tensor), "a recipe standardises classification heads only"
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    spread, mean = torch.std_mean(logits, dim=-1, correction=0, keepdim=True)
    return (logits - mean) / (spread + 1e-7)


def total_variation(
    student: Output, teacher: Output, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Half the sum of absolute differences of probabilities of logits [..., classes], a mean over
    the rows, or those of them where the mask [...] is true."""
    assert isinstance(student, Tensor) and isinstance(teacher, Tensor)
    found, expected = (
        (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(dim=-1)
        for logits in (student, teacher)
    )
    rows = (found - expected).abs().sum(dim=-1) / 2
    if mask is None:
        return rows.mean()
    return rows.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _near_an_end(field: str, share: float, ends: str) -> str:
    return (
        f"{field} is {share}, so near an end of the mixture that fp32 loses the smaller part; "
        f"expected {ends}, or {LEAST_SHARE:g} to {1.0 - LEAST_SHARE:g}"
    )
