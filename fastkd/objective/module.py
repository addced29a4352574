"""All terms of a recipe, and how they add up."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.layer_map import LayerMap
from fastkd.objective.attention import AttentionTerm, Layers
from fastkd.objective.divisors import Inputs, Reduction, count_divisors
from fastkd.objective.states import StateTerm
from fastkd.recipe import Losses


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
