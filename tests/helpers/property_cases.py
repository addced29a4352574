"""One call of an op that the property tests change and repeat, and what is drawn for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import fastkd_kernels
import torch
from fastkd_kernels import reference
from kernel_cases import gram_form
from torch import Tensor

LAYOUTS = ("plain", "tokens first", "reversed", "sliced", "expanded")


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

    @property
    def grams(self) -> bool:
        """Whether it may be made of Grams that cancel: of several head sizes or teacher layers."""
        sizes = {tensor.shape[-1] for tensor in (*self.student, *self.teacher)}
        mixed = len(sizes) > 1 or len(self.teacher) > len(self.student)
        return mixed and self.tuning.get("algorithm") in ("gram", "auto")

    @property
    def operands(self) -> torch.dtype | None:
        """What products of the backward round to; Grams that cancel stay in fp32."""
        single = self.grams and self.student[0].dtype.itemsize == 2
        return torch.float32 if single else None

    def run(
        self, upstream: Tensor, *, definition: bool = False, grams: bool = False, **options: Any
    ) -> list[Tensor]:
        """Losses `[n]`, then the gradients of `leaves`; the definition made of Grams with `grams`
        where the op may be."""
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        count = len(self.student)
        own = replace(self, student=leaves[:count], trained=leaves[count:])
        positional, named = self.arguments(own)
        if definition:
            definition_of = gram_form if grams and self.grams else getattr(reference, self.op)
            made = definition_of(*positional, **named)
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
        # 140 are several blocks or chunks
        self.tokens = self.draw.choice(range(1, 7) if self.small else [*range(1, 21), *[140] * 5])
        if self.tokens > 20:
            self.pairs, self.batch = min(self.pairs, 2), min(self.batch, 2)

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
