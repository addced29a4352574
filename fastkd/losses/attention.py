"""The terms that compare attention and relations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from fastkd_kernels import (
    AttentionState,
    attention_divergence,
    attention_score_mse,
    relation_divergence,
)
from torch import Tensor

from fastkd.errors import UserError
from fastkd.layer_map import AttentionMap, LayerMap, Link, Progress
from fastkd.losses.base import (
    AttentionMappedTerm,
    Batch,
    LossInfo,
    ModelPair,
)
from fastkd.losses.counts import Reduction
from fastkd.losses.relation_heads import check_relation_heads
from fastkd.recipe.losses import AttentionLoss, RelationsLoss

States = list[AttentionState]
Relation = Literal["qq", "kk", "vv", "qk"]
DivergenceKind = Literal["kl", "reverse_kl", "js", "mse", "cross_entropy", "cosine"]


class ScoreTerm(AttentionMappedTerm):
    """Mean squared difference of attention scores (TinyBERT, arXiv 1909.10351, eq. 7)."""

    def __init__(self, layer_map: LayerMap, pair: ModelPair, reduction: Reduction) -> None:
        super().__init__(layer_map)
        _check_blend("attention", layer_map, averages=True)
        self.causal = pair.causal
        self.reduction = reduction
        self.matches = tuple(
            LossInfo("attention", "attention", label, "pairs") for label in layer_map.labels()
        )

    def forward(self, batch: Batch) -> Tensor:
        """Losses [links], fp32."""
        states = batch.teacher.attention
        several = any(len(link.teachers) > 1 for link in self.links)
        shares = [[1 / len(link.teachers)] * len(link.teachers) for link in self.links]
        return attention_score_mse(
            [batch.student.attention[link.student] for link in self.links],
            [
                [states[t] for t in link.teachers] if several else states[link.teachers[0]]
                for link in self.links
            ],
            teacher_weights=shares if several else None,
            key_mask=batch.mask,
            query_mask=batch.mask if self.reduction == "valid" else None,
            causal=self.causal,
            reduction=self.reduction,
        )


class ProbabilityTerm(AttentionMappedTerm):
    """Divergence of attention probabilities (MiniLM, arXiv 2002.10957)."""

    def __init__(self, loss: AttentionLoss, layer_map: LayerMap, pair: ModelPair) -> None:
        super().__init__(layer_map)
        _check_blend("attention", layer_map, averages=False)
        assert loss.kind != "score_mse", "scores have a term of their own"
        _check_links(pair, self.links, sinks=True)
        self.kind: DivergenceKind = loss.kind
        self.temperature = loss.temperature
        self.pair = pair
        self.matches = tuple(
            LossInfo("attention", "attention", label, "rows") for label in layer_map.labels()
        )

    def forward(self, batch: Batch) -> Tensor:
        """Losses [links], fp32."""

        def divergence(student: States, teacher: States, window: int | None) -> Tensor:
            return attention_divergence(
                student,
                teacher,
                kind=self.kind,
                temperature=self.temperature,
                key_mask=batch.mask,
                query_mask=batch.mask,
                causal=self.pair.causal,
                window=window,
            )

        return _by_window(self, self.pair, batch, divergence)


class RelationsTerm(AttentionMappedTerm):
    """Divergence of relations among queries, keys and values (MiniLMv2, arXiv 2012.15828)."""

    def __init__(self, loss: RelationsLoss, layer_map: LayerMap, pair: ModelPair) -> None:
        super().__init__(layer_map)
        _check_blend("relations", layer_map, averages=False)
        self.loss = loss
        self.pair = pair
        self.relation_heads = loss.relation_heads or pair.heads[1]
        _check_links(pair, self.links, sinks=False)
        check_relation_heads(loss.relations, self.relation_heads, pair.shapes)
        self.matches = tuple(
            LossInfo("relations", f"relations.{relation}", label, "rows")
            for relation in loss.relations
            for label in layer_map.labels()
        )

    def forward(self, batch: Batch) -> Tensor:
        """Losses [relations * links], fp32."""
        losses = []
        for relation in self.loss.relations:

            def divergence(
                student: States,
                teacher: States,
                window: int | None,
                relation: Relation = relation,
            ) -> Tensor:
                return relation_divergence(
                    student,
                    teacher,
                    relation=relation,
                    relation_heads=self.relation_heads,
                    kind=self.loss.kind,
                    temperature=self.loss.temperature,
                    key_mask=batch.mask,
                    query_mask=batch.mask,
                    causal=self.pair.causal,
                    window=window,
                )

            losses.append(_by_window(self, self.pair, batch, divergence))
        return torch.cat(losses)


def _by_window(
    term: AttentionMappedTerm,
    pair: ModelPair,
    batch: Batch,
    divergence: Callable[[States, States, int | None], Tensor],
) -> Tensor:
    """Losses [links] of a divergence that is called once for each window of local attention."""
    groups: dict[int | None, list[int]] = {}
    for number, link in enumerate(term.links):
        groups.setdefault(_window(pair, link), []).append(number)
    losses: dict[int, Tensor] = {}
    for window, members in groups.items():
        links = [term.links[number] for number in members]
        found = divergence(
            [batch.student.attention[link.student] for link in links],
            [batch.teacher.attention[link.teachers[0]] for link in links],
            window,
        )
        losses |= dict(zip(members, found.unbind(), strict=True))
    return torch.stack([losses[number] for number in range(len(term.links))])


def _window(pair: ModelPair, link: Link) -> int | None:
    """How far the two layers of a link attend; `None` is all tokens.

    Raises:
        UserError: not equally far.
    """
    student, teacher = pair.windows[0].get(link.student), pair.windows[1].get(link.teachers[0])
    if student != teacher:
        raise UserError(
            f"student layer {link.student} attends within {student or 'all'} tokens and teacher "
            f"layer {link.teachers[0]} within {teacher or 'all'}, so their probabilities can't "
            "be compared; give a layer_map that pairs local layers with local ones"
        )
    return student


def _check_links(pair: ModelPair, links: Iterable[Link], *, sinks: bool) -> None:
    """See that the layers of links can be compared, before data is read.

    Raises:
        UserError: naming the first pair that can't.
    """
    for link in links:
        _window(pair, link)
        have = link.student in pair.sinks[0], link.teachers[0] in pair.sinks[1]
        if sinks and have[0] != have[1]:
            raise UserError(
                f"student layer {link.student} has {'' if have[0] else 'no '}attention sinks and "
                f"teacher layer {link.teachers[0]} has {'' if have[1] else 'no '}sinks, so their "
                "probabilities can't be compared; give a layer_map that pairs such layers with "
                "each other"
            )


def _check_blend(term: str, layer_map: LayerMap, *, averages: bool) -> None:
    blended = any(len(link.teachers) > 1 for link in layer_map.links(Progress()))
    by_attention = isinstance(layer_map, AttentionMap)
    if not blended or (averages and not by_attention):
        return
    name = "attention" if by_attention else "mean_target"
    raise UserError(
        f"layer_map {name} mixes several teacher layers into one target, which losses.{term} of "
        "this kind can't compare with; give the term a layer_map of its own, such as mean_loss"
    )
