"""Random problems of every op over shapes, masks, strides and options, for the property tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, get_args

import torch
from fastkd_kernels import (
    AttentionDivergenceKind,
    AttentionState,
    IndexerState,
    LogitsDivergenceKind,
    LogitsHead,
)
from property_cases import Common, Problem
from torch import Tensor

KINDS = get_args(AttentionDivergenceKind)
LOGITS_KINDS = get_args(LogitsDivergenceKind)


def _interleaved(*columns: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for row in zip(*columns, strict=True) for tensor in row]


def _states(tensors: Sequence[Tensor], scale: float, values: bool) -> list[AttentionState]:
    step = 3 if values else 2
    rows = [tensors[i : i + step] for i in range(0, len(tensors), step)]
    return [AttentionState(row[0], row[1], row[2] if values else None, scale) for row in rows]


def _same_teacher(problem: Problem) -> Problem | None:
    """The student as its own teacher, where the shapes are those of the teacher."""
    own, target = problem.student, problem.teacher
    # several teacher layers are no student's twin
    if [t.shape for t in own] != [t.shape for t in target]:
        return None
    return replace(problem, teacher=[tensor.detach() for tensor in own])


def _attention(
    draw: Random,
    small: bool,
    op: str,
    options: dict[str, Any],
    *,
    tuning: dict[str, Any] | None = None,
    relation: bool = False,
    layers: int = 1,
) -> Problem:
    """`layers` teacher layers a pair, whose scores are averaged."""
    common = Common(draw, small)
    heads = draw.choice([1, 2] if small else [1, 2, 4])
    kv_heads = [draw.choice([n for n in (1, 2, 4) if heads % n == 0]) for _ in range(2)]
    dims = [common.size(6)] * 2 if draw.random() < 0.5 else [common.size(6), common.size(6)]
    if relation:
        # widths of all tensors are to be cut into as many relation heads
        kv_heads = [heads, heads]
        options = {**options, "relation_heads": draw.choice([1, heads])}
    sides = [
        _interleaved(
            common.each(common.batch, heads, common.tokens, dim, layers=count),
            *(
                common.each(common.batch, kv, common.tokens, dim, layers=count)
                for _ in range(2 if relation else 1)
            ),
        )
        for kv, dim, count in zip(kv_heads, dims, (1, layers), strict=True)
    ]
    rows = torch.rand(common.batch, common.tokens, generator=common.generator) < 0.8
    causal = bool(options.get("causal", False))

    def arguments(problem: Problem) -> tuple[list[Any], dict[str, Any]]:
        own, target = (
            _states(tensors, dim**-0.5, relation)
            for tensors, dim in zip((problem.student, problem.teacher), dims, strict=True)
        )
        grouped = [target[i : i + layers] for i in range(0, len(target), layers)]
        return [own, target if layers == 1 else grouped], {
            **options,
            "key_mask": problem.mask,
            "query_mask": queries(problem),
        }

    def queries(problem: Problem) -> Tensor:
        """Some of the valid tokens; a drawn row belongs to a position, whatever the batch."""
        kept = torch.zeros_like(problem.mask)
        kept[:, : common.tokens] = rows[:1]
        return problem.mask & kept

    def count(problem: Problem) -> Tensor:
        entries = queries(problem)[:, :, None] & problem.mask[:, None, :]
        if causal:
            entries = entries.tril()
        # a mean over entries, or over rows, each of which sees itself
        total = entries.sum() if op == "attention_score_mse" else queries(problem).sum()
        return total.expand(common.pairs)

    return Problem(
        op,
        *sides,
        mask=common.mask(),
        axis=2,
        arguments=arguments,
        count=count,
        twin=_same_teacher,
        tuning=tuning or {},
    )


def score_mse(draw: Random, small: bool) -> Problem:
    layers = draw.choice([1, 1, 2])
    options = {"causal": draw.random() < 0.5}
    tuning = {"algorithm": draw.choice(["auto", "tiles", "gram"])}
    return _attention(draw, small, "attention_score_mse", options, tuning=tuning, layers=layers)


def _divergence_options(draw: Random) -> dict[str, Any]:
    return {
        "kind": draw.choice(KINDS),
        "temperature": draw.choice([1.0, 0.5, 3.0]),
        "causal": draw.random() < 0.5,
        "window": draw.choice([None, None, 1, 3, 50]),
    }


def divergence(draw: Random, small: bool) -> Problem:
    return _attention(draw, small, "attention_divergence", _divergence_options(draw))


def relations(draw: Random, small: bool) -> Problem:
    options = _divergence_options(draw) | {"relation": draw.choice(["qq", "kk", "vv", "qk"])}
    return _attention(draw, small, "relation_divergence", options, relation=True)


def indexer(draw: Random, small: bool) -> Problem:
    """Weights are held as `[batch, index_heads, tokens]`, so that tokens have one place."""
    common = Common(draw, small)
    index_heads, heads = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    kv_heads = draw.choice([n for n in (1, 2, 4) if heads % n == 0])
    dim, teacher_dim = common.size(6), common.size(6)
    causal, four, sunk = (draw.random() < 0.5 for _ in range(3))
    student = _interleaved(
        common.each(common.batch, index_heads, common.tokens, dim),
        common.each(common.batch, 1, common.tokens, dim),
        common.each(common.batch, index_heads, common.tokens),
    )
    teacher = _interleaved(
        common.each(common.batch, heads, common.tokens, teacher_dim),
        common.each(common.batch, kv_heads, common.tokens, teacher_dim),
    )
    rows = torch.rand(1, common.tokens, generator=common.generator) < 0.8
    softcap = draw.choice([None, 1.5])

    def queries(problem: Problem) -> Tensor:
        """Some of the valid tokens; a drawn row belongs to a position, whatever the batch."""
        kept = torch.zeros_like(problem.mask)
        kept[:, : common.tokens] = rows
        return problem.mask & kept

    def arguments(
        problem: Problem, scale: float = teacher_dim**-0.5, softcap: float | None = softcap
    ) -> tuple[list[Any], dict[str, Any]]:
        own, target = problem.student, problem.teacher
        indexers = [
            IndexerState(own[i], own[i + 1] if four else own[i + 1].squeeze(1), own[i + 2].mT)
            for i in range(0, len(own), 3)
        ]
        sinks = problem.frozen or [None] * common.pairs
        attention = [
            AttentionState(*target[2 * i : 2 * i + 2], None, scale, softcap, sinks[i])
            for i in range(common.pairs)
        ]
        masks = {"key_mask": problem.mask, "query_mask": queries(problem)}
        return [indexers, attention], {**masks, "causal": causal}

    def twin(problem: Problem) -> Problem:
        """Positive indexers, and as their teachers the attention that makes the same scores."""
        own = [tensor.detach().abs() for tensor in problem.student]
        target = []
        for query, key, weights in zip(own[::3], own[1::3], own[2::3], strict=True):
            summed = (query.double() * weights.double()[..., None]).sum(1, keepdim=True)
            target += [summed.to(query.dtype), key]
        plain = partial(arguments, scale=1.0, softcap=None)
        return replace(problem, student=own, teacher=target, frozen=[], arguments=plain)

    return Problem(
        "indexer_divergence",
        student,
        teacher,
        frozen=[common.values(heads) for _ in range(common.pairs)] if sunk else [],
        mask=common.mask(),
        axis=2,
        arguments=arguments,
        # each row sees itself
        count=lambda problem: queries(problem).sum().expand(common.pairs),
        twin=twin,
    )


def hidden(draw: Random, small: bool, op: str) -> Problem:
    common = Common(draw, small)
    weights = draw.choice(["none", "shared", "shared+bias", "each", "each+bias"])
    # a vector of one number has a sign for its direction, and no gradient
    least = 0 if op == "hidden_mse" else 1
    own = common.size(7) + least
    target = own if weights == "none" else common.size(7) + least
    sides = [common.each(common.batch, common.tokens, width) for width in (own, target)]
    copies = 1 if weights.startswith("shared") else common.pairs
    trained = []
    if weights != "none":
        trained += [common.values(target, own) for _ in range(copies)]
    if weights.endswith("+bias"):
        trained += [common.values(target) for _ in range(copies)]

    def projection(problem: Problem) -> dict[str, Any]:
        made = {}
        for name, first in (("weight", 0), ("bias", copies)):
            found = problem.trained[first : first + copies]
            if found:
                made[name] = found[0] if weights.startswith("shared") else found
        return made

    def arguments(problem: Problem) -> tuple[list[Any], dict[str, Any]]:
        named = {**projection(problem), "mask": problem.mask}
        return [problem.student, problem.teacher], named

    def twin(problem: Problem) -> Problem:
        made = []
        for pair, states in enumerate(problem.student):
            value = states
            for name, given in projection(problem).items():
                tensor = given if isinstance(given, Tensor) else given[pair]
                value = value @ tensor.mT if name == "weight" else value + tensor
            made.append(value.detach())
        return replace(problem, teacher=made)

    return Problem(
        op,
        *sides,
        trained=trained,
        mask=common.mask(),
        axis=1,
        arguments=arguments,
        count=lambda problem: problem.mask.sum().expand(common.pairs),
        twin=twin,
    )


def _logits_options(draw: Random) -> dict[str, Any]:
    kind = draw.choice(LOGITS_KINDS)
    return {
        "kind": kind,
        "temperature": 1.0 if kind == "mse" else draw.choice([1.0, 0.5, 3.0]),
        "scale_by_temperature": draw.random() < 0.5,
        "beta": draw.choice([0.5, 0.1, 0.9]),
        "skew": draw.choice([0.1, 0.7]),
    }


def logits(draw: Random, small: bool) -> Problem:
    common = Common(draw, small)
    heads = [draw.random() < 0.5 for _ in range(2)]
    bias = draw.random() < 0.5
    widths = [common.size(6), common.size(6)]
    vocabularies = [common.size(9) + 1] * 2
    if draw.random() < 0.5:
        vocabularies[1] += draw.randint(0, 3)
    sides, heads_of = [], []
    for head, width, vocabulary in zip(heads, widths, vocabularies, strict=True):
        sides.append([common.values(common.batch, common.tokens, width if head else vocabulary)])
        weights = [common.values(vocabulary, width)] if head else []
        heads_of.append([*weights, *([common.values(vocabulary)] if head and bias else [])])
    options = _logits_options(draw)
    # of both models, so that either may be the other's twin
    finish = (draw.choice([1.0, 0.5]), draw.choice([None, 3.0]))
    labels = None
    if draw.random() < 0.5:
        shape = (common.batch, common.tokens)
        labels = torch.randint(vocabularies[0], shape, generator=common.generator)
        labels[torch.rand(shape, generator=common.generator) < 0.2] = -100

    def side(states: list[Tensor], parameters: list[Tensor]) -> Any:
        if not parameters:
            return states[0]
        weight, *rest = parameters
        return LogitsHead(states[0], weight, *(rest or [None]), *finish)

    def arguments(problem: Problem) -> tuple[list[Any], dict[str, Any]]:
        own = side(problem.student, problem.trained)
        target = side(problem.teacher, problem.frozen)
        return [own, target], {**options, "mask": problem.mask, "labels": problem.labels}

    def count(problem: Problem) -> Tensor:
        counts = [problem.mask.sum()]
        if problem.labels is not None:
            counts.append((problem.mask & (problem.labels != -100)).sum())
        return torch.stack(counts)

    def twin(problem: Problem) -> Problem:
        # cross-entropy with labels has no reason to vanish
        return replace(
            problem,
            teacher=[tensor.detach() for tensor in problem.student],
            frozen=[tensor.detach() for tensor in problem.trained],
            labels=None,
        )

    return Problem(
        "logits_divergence",
        *sides,
        trained=heads_of[0],
        frozen=heads_of[1],
        labels=labels,
        mask=common.mask(),
        axis=1,
        arguments=arguments,
        count=count,
        twin=twin,
    )


def _hidden(op: str) -> Callable[[Random, bool], Problem]:
    return lambda draw, small: hidden(draw, small, op)


FAMILIES: dict[str, Callable[[Random, bool], Problem]] = {
    "attention_score_mse": score_mse,
    "attention_divergence": divergence,
    "relation_divergence": relations,
    "indexer_divergence": indexer,
    "hidden_mse": _hidden("hidden_mse"),
    "hidden_cosine": _hidden("hidden_cosine"),
    "hidden_normalized_mse": _hidden("hidden_normalized_mse"),
    "logits_divergence": logits,
}
