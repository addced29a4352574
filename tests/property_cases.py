"""Random problems for the property tests: every op over shapes, masks, dtypes, strides, options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import fastkd_kernels
import torch
from fastkd_kernels import AttentionState, LogitsHead, reference
from torch import Tensor

LAYOUTS = ("plain", "tokens first", "reversed", "sliced", "expanded")
KINDS = ("kl", "reverse_kl", "js", "mse", "cross_entropy", "cosine")
LOGITS_KINDS = ("kl", "reverse_kl", "js", "skew_kl", "mse", "soft_ce")
# their loss is the teacher's entropy where both models agree
ENTROPIES = ("cross_entropy", "soft_ce")


def laid_out(shape: Sequence[int], layout: str, generator: torch.Generator) -> Tensor:
    """Random fp64 values of `shape` in memory that is laid out as named."""

    def made(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if layout == "tokens first" and len(shape) == 4:
        batch, heads, tokens, dim = shape
        return made(batch, tokens, heads, dim).transpose(1, 2)
    if layout == "reversed":
        return made(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return made(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    if layout == "expanded":
        return made(1, *shape[1:]).expand(*shape)
    return made(*shape)


def recast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Another dtype with the same strides."""
    if value.dtype == dtype:
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=dtype)
    # an expanded tensor has one value at many places: all of them write the same
    for index in range(value.shape[0] if value.stride(0) else 1):
        made[index] = value[index].to(dtype)
    return made


@dataclass(frozen=True)
class Problem:
    """One call of one op.

    `student` and `teacher` have batch first and tokens at `axis`; `trained` and `frozen` have
    neither (weights and biases). Gradients reach `student` and `trained`. `mask` is bool
    `[batch, tokens]`. `count` gives what each loss is a mean over.
    """

    op: str
    student: list[Tensor]
    teacher: list[Tensor]
    mask: Tensor
    axis: int
    arguments: Callable[[Problem], tuple[list[Any], dict[str, Any]]]
    count: Callable[[Problem], Tensor]
    twin: Callable[[Problem], Problem | None]
    trained: list[Tensor] = field(default_factory=list)
    frozen: list[Tensor] = field(default_factory=list)
    labels: Tensor | None = None
    # options that the definition does not have
    tuning: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.student, *self.trained]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """`change` applied to every float tensor."""
        made = {
            name: [change(tensor) for tensor in getattr(self, name)]
            for name in ("student", "teacher", "trained", "frozen")
        }
        return replace(self, **made)

    def cast(self, dtype: torch.dtype) -> Problem:
        return self.mapped(lambda tensor: recast(tensor, dtype))

    def run(self, upstream: Tensor, *, definition: bool = False, **options: Any) -> list[Tensor]:
        """Losses `[n]`, then the gradients of `leaves`."""
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        count = len(self.student)
        own = replace(self, student=leaves[:count], trained=leaves[count:])
        positional, named = self.arguments(own)
        if definition:
            made = getattr(reference, self.op)(*positional, **named)
        else:
            made = getattr(fastkd_kernels, self.op)(*positional, **named, **self.tuning, **options)
        losses = torch.stack(made) if isinstance(made, tuple) else made.reshape(-1)
        # a relation reads two of queries, keys and values
        grads = torch.autograd.grad(losses, leaves, upstream.to(losses), materialize_grads=True)
        return [losses.detach(), *grads]

    def part(self, items: slice) -> Problem:
        """The same op on some items of the batch."""
        return replace(
            self,
            student=[tensor[items] for tensor in self.student],
            teacher=[tensor[items] for tensor in self.teacher],
            mask=self.mask[items],
            labels=None if self.labels is None else self.labels[items],
        )

    def padded(self, extra: int, garbage: float) -> Problem:
        """`extra` masked tokens more in every item, full of `garbage`."""

        def longer(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            shape[self.axis] = extra
            return torch.cat([tensor, tensor.new_full(shape, garbage)], dim=self.axis)

        batch = self.mask.shape[0]
        labels = self.labels
        if labels is not None:
            labels = torch.cat([labels, labels.new_zeros(batch, extra)], dim=1)
        return replace(
            self,
            student=[longer(tensor) for tensor in self.student],
            teacher=[longer(tensor) for tensor in self.teacher],
            mask=torch.cat([self.mask, self.mask.new_zeros(batch, extra)], dim=1),
            labels=labels,
        )


@dataclass
class Common:
    """What every problem draws: sizes, layouts, values and a mask."""

    draw: Random
    small: bool

    def __post_init__(self) -> None:
        most = 2 if self.small else 3
        self.generator = torch.Generator().manual_seed(self.draw.randint(0, 2**20))
        self.pairs = self.draw.randint(1, most)
        self.batch = self.draw.randint(1, most)
        # 150 are several blocks or chunks
        self.tokens = self.draw.choice(range(1, 7) if self.small else [*range(1, 21), *[150] * 5])

    def values(self, *shape: int) -> Tensor:
        return laid_out(shape, self.draw.choice(LAYOUTS), self.generator)

    def each(self, *shape: int, layers: int = 1) -> list[Tensor]:
        """So many tensors a pair, all in one layout."""
        layout = self.draw.choice(LAYOUTS)
        return [laid_out(shape, layout, self.generator) for _ in range(self.pairs * layers)]

    def mask(self) -> Tensor:
        share = self.draw.choice([1.0, 0.8, 0.8, 0.4, 0.0])
        return torch.rand(self.batch, self.tokens, generator=self.generator) < share

    def size(self, most: int) -> int:
        return int(self.draw.randint(1, most))


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


def logits(draw: Random, small: bool) -> Problem:
    common = Common(draw, small)
    heads = [draw.random() < 0.5 for _ in range(2)]
    bias = draw.random() < 0.5
    kind = draw.choice(LOGITS_KINDS)
    widths = [common.size(6), common.size(6)]
    vocabularies = [common.size(9) + 1] * 2
    if draw.random() < 0.5:
        vocabularies[1] += draw.randint(0, 3)
    sides, heads_of = [], []
    for head, width, vocabulary in zip(heads, widths, vocabularies, strict=True):
        sides.append([common.values(common.batch, common.tokens, width if head else vocabulary)])
        weights = [common.values(vocabulary, width)] if head else []
        heads_of.append([*weights, *([common.values(vocabulary)] if head and bias else [])])
    options = {
        "kind": kind,
        "temperature": 1.0 if kind == "mse" else draw.choice([1.0, 0.5, 3.0]),
        "scale_by_temperature": draw.random() < 0.5,
        "beta": draw.choice([0.5, 0.1, 0.9]),
        "skew": draw.choice([0.1, 0.7]),
    }
    labels = None
    if draw.random() < 0.5:
        shape = (common.batch, common.tokens)
        labels = torch.randint(vocabularies[0], shape, generator=common.generator)
        labels[torch.rand(shape, generator=common.generator) < 0.2] = -100

    def side(states: list[Tensor], parameters: list[Tensor]) -> Any:
        return LogitsHead(states[0], *parameters) if parameters else states[0]

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
    "hidden_mse": _hidden("hidden_mse"),
    "hidden_cosine": _hidden("hidden_cosine"),
    "hidden_normalized_mse": _hidden("hidden_normalized_mse"),
    "logits_divergence": logits,
}
