"""The objective: which tensors are matched, by which op, and how the terms add up.

A loss here is a mean over valid query-key pairs or over valid tokens of the *whole* optimiser step.
One micro-batch of one rank holds a part of those, so its means are scaled by that part: the sum
over micro-batches and ranks is then the same however the step is cut, and padding changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from fastkd_kernels import attention_score_mse, hidden_mse
from torch import Tensor, nn

from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.layer_map import LayerMap
from fastkd.recipe import Losses

Inputs = Mapping[str, Tensor]
Layers = tuple[tuple[int, int], ...]
Reduction = Literal["valid", "tinybert"]


def count_divisors(inputs: Inputs, causal: bool, reduction: Reduction) -> Tensor:
    """What a micro-batch contributes to the two divisors of a step.

    Args:
        inputs: `input_ids` [batch, tokens] and, if padded, `attention_mask` of the same shape.
        causal: whether queries see earlier keys only.
        reduction: whether padding counts.

    Returns:
        fp64 [2] on the inputs' device: query-key pairs and tokens.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask") if reduction == "valid" else None
    valid = torch.ones_like(ids, dtype=torch.float64) if mask is None else mask.to(torch.float64)
    visible = causal and reduction == "valid"
    keys = valid.cumsum(dim=1) if visible else valid.sum(dim=1, keepdim=True)
    return torch.stack([(valid * keys).sum(), valid.sum()])


@dataclass(frozen=True)
class Match:
    """One loss of one layer pair: its term, the layers of student and teacher, its weight."""

    term: Literal["attention", "hidden", "embedding"]
    student: int
    teacher: int
    weight: float

    @property
    def label(self) -> str:
        """Name in metrics and tables."""
        return f"{self.term}/{self.student}-{self.teacher}"


class AttentionTerm(nn.Module):
    """Score MSE of all mapped blocks in one call."""

    def __init__(self, pairs: Layers, reduction: Reduction, causal: bool) -> None:
        super().__init__()
        self.pairs = pairs
        self.reduction = reduction
        self.causal = causal

    def forward(self, student: Capture, teacher: Capture, mask: Tensor | None) -> Tensor:
        """Losses [pairs], fp32."""
        return attention_score_mse(
            [student.attention[s] for s, _ in self.pairs],
            [teacher.attention[t] for _, t in self.pairs],
            key_mask=mask,
            query_mask=mask if self.reduction == "valid" else None,
            causal=self.causal,
            reduction=self.reduction,
        )


class StateTerm(nn.Module):
    """MSE of hidden states and embeddings of all mapped layers in one call.

    The projections are parameters of this module itself, so that ZeRO-3 gathers them for its
    `forward`: `weight_0`, or `weight_0`, `weight_1`, ... with one a pair; [teacher, student] width.
    """

    def __init__(
        self,
        pairs: Layers,
        projections: int,
        widths: tuple[int, int],
        bias: bool,
        reduction: Reduction,
    ) -> None:
        """Make the projections.

        Args:
            pairs: (student layer, teacher layer).
            projections: 0 for identity, 1 for a shared one, or as many as pairs.
            widths: of student and teacher.
            bias: whether the projections have one.
            reduction: what the mean is over.
        """
        super().__init__()
        self.pairs = pairs
        self.projections = projections
        self.bias = bias and projections > 0
        self.reduction = reduction
        for index in range(projections):
            linear = nn.Linear(*widths, bias=bias)
            for kind, parameter in linear.named_parameters():
                self.register_parameter(f"{kind}_{index}", parameter)

    def forward(self, student: Capture, teacher: Capture, mask: Tensor | None) -> Tensor:
        """Losses [pairs], fp32."""
        return hidden_mse(
            [student.hidden[s] for s, _ in self.pairs],
            [teacher.hidden[t] for _, t in self.pairs],
            weight=self._parameters_of("weight"),
            bias=self._parameters_of("bias") if self.bias else None,
            mask=mask,
            reduction=self.reduction,
        )

    def _parameters_of(self, kind: str) -> Tensor | list[Tensor] | None:
        found: list[Tensor] = [
            self.get_parameter(f"{kind}_{index}") for index in range(self.projections)
        ]
        return found[0] if len(found) == 1 else found or None


class Objective(nn.Module):
    """All terms of a recipe, and the projections that belong to them."""

    def __init__(
        self, losses: Losses, layers: LayerMap, widths: tuple[int, int], causal: bool
    ) -> None:
        """Choose the terms.

        Args:
            losses: section of the recipe.
            layers: the mapping in force.
            widths: hidden sizes of student and teacher.
            causal: whether attention sees earlier tokens only.

        Raises:
            UserError: no projection is asked for, but the widths differ.
        """
        super().__init__()
        self.causal = causal
        self.reduction: Reduction = losses.reduction
        self.matches: list[Match] = []
        if losses.attention:
            self._match("attention", layers.pairs, losses.attention.weight)
        if losses.hidden:
            self._match("hidden", layers.pairs, losses.hidden.weight)
        if losses.embedding:
            self._match("embedding", ((0, 0),), losses.embedding.weight)

        self.terms = nn.ModuleList()
        if losses.attention:
            self.terms.append(AttentionTerm(layers.pairs, losses.reduction, causal))
        states = tuple((m.student, m.teacher) for m in self.matches if m.term != "attention")
        if states:
            count = _projections(losses, len(states), widths)
            self.terms.append(
                StateTerm(states, count, widths, losses.projection_bias, losses.reduction)
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """One name a loss, in the order of `forward`."""
        return tuple(match.label for match in self.matches)

    def layers(self, side: Literal["student", "teacher"]) -> dict[str, set[int]]:
        """The layers of one model that `capture` must record, as its keyword arguments."""
        wanted: dict[str, set[int]] = {"attention": set(), "hidden": set()}
        for match in self.matches:
            kind = "attention" if match.term == "attention" else "hidden"
            wanted[kind].add(match.student if side == "student" else match.teacher)
        return wanted

    def divisors(self, inputs: Inputs) -> Tensor:
        """What a micro-batch contributes to the divisors of a step: fp64 [2]."""
        return count_divisors(inputs, self.causal, self.reduction)

    def forward(
        self, student: Capture, teacher: Capture, mask: Tensor | None, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the terms up.

        Args:
            student: captured tensors with gradient.
            teacher: captured tensors without.
            mask: bool [batch, tokens], or `None` where nothing is padded.
            shares: fp32 [2], this micro-batch's part of the step's query-key pairs and tokens.

        Returns:
            The weighted total, a scalar, and the raw losses [labels], detached; both fp32 and
            scaled by the shares.
        """
        raw = torch.cat(
            [
                term(student, teacher, mask) * share
                for term, share in zip(self.terms, self._shares(shares), strict=True)
            ]
        )
        # Python numbers, so that no weight is copied to the device in a step
        total = sum(weight * raw[start:stop].sum() for start, stop, weight in self._groups())
        assert isinstance(total, Tensor)
        return total, raw.detach()

    def _shares(self, shares: Tensor) -> list[Tensor]:
        return [shares[0 if isinstance(term, AttentionTerm) else 1] for term in self.terms]

    def _groups(self) -> list[tuple[int, int, float]]:
        groups: list[tuple[int, int, float]] = []
        for _, matches in itertools.groupby(self.matches, key=lambda match: match.term):
            same = list(matches)
            start = groups[-1][1] if groups else 0
            groups.append((start, start + len(same), same[0].weight))
        return groups

    def _match(
        self, term: Literal["attention", "hidden", "embedding"], pairs: Layers, weight: float
    ) -> None:
        self.matches.extend(Match(term, s, t, weight) for s, t in pairs)


def _projections(losses: Losses, pairs: int, widths: tuple[int, int]) -> int:
    student, teacher = widths
    if losses.projection == "none" and student != teacher:
        raise UserError(
            f"losses.projection is none, but the student is {student} wide and the teacher "
            f"{teacher}; set it to shared or per_pair"
        )
    identity = losses.projection == "none" or (losses.projection == "auto" and student == teacher)
    return 0 if identity else pairs if losses.projection == "per_pair" else 1
