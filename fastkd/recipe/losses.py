"""The section of the objective: its terms, and what they share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fastkd.layer_map.sections import Layers, Temperature
from fastkd.recipe.weights import Balance, Schedule, ShortBalance
from fastkd.section import MOST_HEADS, Section

Tokens = Literal["all", "cls", "mean"]
# a mixture's smaller part, unless it is left out altogether
LEAST_SHARE = 1e-4


class Term(Section):
    """What every term of the objective has."""

    weight: float = Field(default=1.0, ge=0)
    """Factor in the total loss."""
    schedule: Schedule | None = None
    """How that factor changes over the run; not at all where not given."""


class AttentionLoss(Term):
    """Attention of the mapped blocks: scores (TinyBERT, arXiv 1909.10351, eq. 7), or their softmax
    (MiniLM, arXiv 2002.10957)."""

    kind: Literal["score_mse", "kl", "reverse_kl", "js", "mse", "cross_entropy", "cosine"] = (
        "score_mse"
    )
    """Squared difference of the scores before the softmax, or a divergence of the probabilities."""
    temperature: Temperature = 1.0
    """What both models' scores are divided by before the softmax."""
    layer_map: Layers | None = None
    """Mapping of this term; the recipe's where not given."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "score_mse" and self.temperature != 1.0:
            raise ValueError(
                "temperature is given, but score_mse has no softmax; leave it out, or give "
                "another kind"
            )
        return self


class RelationsLoss(Term):
    """Relations inside queries, keys or values (MiniLM, arXiv 2002.10957; MiniLMv2,
    arXiv 2012.15828, eq. 5 to 7)."""

    relations: tuple[Literal["qq", "kk", "vv", "qk"], ...] = Field(
        default=("qq", "kk", "vv"), min_length=1
    )
    """Which vectors are multiplied with which: queries, keys, values."""
    relation_heads: int | None = Field(default=None, gt=0, le=MOST_HEADS)
    """Heads that the vectors are cut into anew; the teacher's attention heads where not given."""
    kind: Literal["kl", "reverse_kl", "js", "mse", "cross_entropy", "cosine"] = "kl"
    """Divergence of the relations' softmax."""
    temperature: Temperature = 1.0
    """What the relations are divided by before the softmax."""
    layer_map: Layers | None = None
    """Mapping of this term; the recipe's where not given."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.relations)) < len(self.relations):
            raise ValueError(
                f"relations names one twice (given {', '.join(self.relations)}); name each once "
                "and give the term a weight"
            )
        return self


class EmbeddingLoss(Term):
    """Embeddings, layer 0 of both models (TinyBERT, arXiv 1909.10351, eq. 9)."""

    kind: Literal["mse", "normalized_mse", "cosine"] = "mse"
    """Squared difference after the projection, the same of states scaled to length one (PKD, arXiv
    1908.09355, eq. 7), or one minus the cosine (DistilBERT, arXiv 1910.01108)."""
    tokens: Tokens = "all"
    """Every token, the first one, or the mean over all."""


class HiddenLoss(EmbeddingLoss):
    """Hidden states of the mapped layers (TinyBERT, arXiv 1909.10351, eq. 8)."""

    layer_map: Layers | None = None
    """Mapping of this term; the recipe's where not given."""


class LogitsLoss(Term):
    """Outputs of the models' heads (Hinton et al., arXiv 1503.02531; TinyBERT, arXiv 1909.10351,
    eq. 10)."""

    kind: Literal["kl", "reverse_kl", "js", "skew_kl", "mse", "soft_ce"] = "kl"
    """Divergence of the probabilities, or the squared difference of the logits."""
    temperature: Temperature = 1.0
    """What both models' logits are divided by; `mse` compares raw logits."""
    scale_by_temperature: bool = False
    """Multiply by the temperature squared, so that gradients keep their size (arXiv 1503.02531)."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Share of the teacher in the mixture of `js`; as in GKD (arXiv 2306.13649), 0 is `kl` and 1 is
    `reverse_kl`."""
    skew: float = Field(default=0.1, ge=0, le=1.0 - LEAST_SHARE)
    """Share of the teacher in the student's mixture of `skew_kl` (DistiLLM, arXiv 2402.03898); 0 is
    `kl`."""

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
                "temperature is given, but mse compares raw logits; leave it out, or give another "
                "kind"
            )
        return self


def _near_an_end(field: str, share: float, ends: str) -> str:
    return (
        f"{field} is {share}, so near an end of the mixture that fp32 loses the smaller part; "
        f"expected {ends}, or {LEAST_SHARE:g} to {1.0 - LEAST_SHARE:g}"
    )


class LabelsLoss(Term):
    """Hard labels: cross-entropy of classes or of the next token, squared error of a number."""


class MlmLoss(Term):
    """Cross-entropy of masked tokens (BERT, arXiv 1810.04805, section 3.1)."""

    probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that is masked: 80 % become the mask, 10 % a random token, 10 % stay."""


class Losses(Section):
    """The terms of the objective, and what they share; a term that is absent is off."""

    attention: AttentionLoss | None = None
    """Attention of the mapped blocks."""
    relations: RelationsLoss | None = None
    """Query, key and value relations of the mapped blocks."""
    hidden: HiddenLoss | None = None
    """Hidden states of the mapped layers."""
    embedding: EmbeddingLoss | None = None
    """Embedding outputs."""
    logits: LogitsLoss | None = None
    """Outputs of the heads."""
    labels: LabelsLoss | None = None
    """Hard labels."""
    mlm: MlmLoss | None = None
    """Masked tokens."""
    balance: ShortBalance = Balance()
    """How the terms are weighed against each other; a word, or a section."""
    reduction: Literal["valid", "tinybert"] = "valid"
    """Means over valid tokens and query-key pairs, or over all as the official TinyBERT code."""
    projection: Literal["auto", "none", "shared", "per_pair"] = "auto"
    """From student to teacher width: one for hidden states and embeddings of all pairs (TinyBERT),
    one a pair, or none; auto is none where the widths agree, else shared."""
    projection_bias: bool = True
    """Whether projections have a bias."""

    @property
    def terms(self) -> dict[str, Term]:
        """The terms that are on, by name, in the order of the fields."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in given.items() if isinstance(value, Term)}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.terms:
            raise ValueError(
                "no term is given; expected attention, relations, hidden, embedding, logits, "
                "labels or mlm"
            )
        reference = self.balance.reference
        if reference is not None and reference not in self.terms:
            raise ValueError(
                f"balance.reference is {reference}, but that term is off; expected one of "
                f"{', '.join(self.terms)}"
            )
        if self.reduction == "tinybert":
            _check_official_kinds(self)
        return self


def _check_official_kinds(losses: Losses) -> None:
    wanted = {"attention": "score_mse", "hidden": "mse", "embedding": "mse"}
    for name, kind in wanted.items():
        given = getattr(losses.terms.get(name), "kind", kind)
        if given != kind:
            raise ValueError(
                f"reduction is tinybert, but {name}.kind is {given}, which the official code does "
                f"not have; expected {kind}, or reduction: valid"
            )
