"""Rows that make one step in different ways, and what shows that it is the same step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastkd.extras import is_installed

LEARNING_RATE = 1e-4
# runs with weights moved by rounding, and how many times their largest change a row may be off
DRAWS, FACTOR = 4, 4.0
# a bound above this part of what it bounds says nothing
SHARP = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


class Case(NamedTuple):
    """Models of a size on a batch of a shape."""

    size: str
    batch: int
    tokens: int
    device: str

    @property
    def shape(self) -> str:
        return f"{self.batch} x {self.tokens}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that is ready to be made."""

    run: Callable[[], Tensor]
    """Both models, the loss, its gradient and an update; gives the loss, detached."""
    optimizer: torch.optim.Optimizer
    """Of the student and its projections."""
    modules: tuple[nn.Module, ...] = ()
    """All that has weights, of a row that the others are held against."""
    condition: Callable[[], float] = lambda: 1.0
    """How many times the loss its terms are, each without a sign: what cancels between them was
    rounded before. Of a row that the others are held against."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to make the step."""

    name: str
    make: Callable[[Case], Step]
    loss: str
    """Rows of one loss must agree."""
    imports: tuple[str, ...] = ()
    """Modules of a peer that it needs."""
    plain: bool = False
    """Whether it is what the others of its loss are held against."""

    @property
    def key(self) -> str:
        return f"{self.name}, {self.loss}"

    @property
    def installed(self) -> bool:
        return all(is_installed(name.split(".")[0]) for name in self.imports)


@dataclass(frozen=True, kw_only=True)
class Group:
    """A job: the rows that can do it, and why others can't."""

    name: str
    what: str
    cases: tuple[Case, ...]
    rows: tuple[Row, ...]
    cannot: dict[str, str] = field(default_factory=dict)

    @property
    def present(self) -> list[Row]:
        return [row for row in self.rows if row.installed]


class Measured(NamedTuple):
    """Loss, and the length of the gradient of all that trains."""

    loss: float
    gradient: float


@contextmanager
def gradient_lengths(optimizer: torch.optim.Optimizer) -> Iterator[list[float]]:
    """Of every update inside: the gradient as the optimiser is given it."""
    found: list[float] = []

    def look(given: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in given.param_groups for p in group["params"]]
        lengths = [g.float().norm() for g in gradients if g is not None]
        found.append(float(torch.stack(lengths).double().square().sum().sqrt()))

    handle = optimizer.register_step_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def first_step(step: Step) -> Measured:
    """What a step says of itself, before its update."""
    with gradient_lengths(step.optimizer) as lengths:
        loss = float(step.run())
    (length,) = lengths
    return Measured(loss, length)


@torch.no_grad()
def move_weights(modules: tuple[nn.Module, ...], seed: int) -> None:
    """Round every weight up or down at random, so that what is made of it moves as by rounding.

    An output of a linear layer adds up `n` products, whose partial sums are rounded `n` times: as
    a walk, that moves it as far as `sqrt(n)` roundings of each product do. Other weights are read
    one by one, and moved by one.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in (one for top in modules for one in top.modules()):
        for weight in module.parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            linear = isinstance(module, nn.Linear) and weight.ndim == 2
            terms = weight.shape[1] if linear else 1
            size = torch.finfo(weight.dtype).eps / 2 * math.sqrt(terms)
            up = torch.rand(weight.shape, generator=generator) < 0.5
            signs = torch.where(up, size, -size).to(weight.device)
            weight.copy_(weight.float() * (1 + signs))


def bounds(row: Row, case: Case, draws: int = DRAWS) -> tuple[Measured, Measured]:
    """What `row` measures, and how far rounding may take another row from it.

    The bound is `FACTOR` times the largest change of a few runs with moved weights, and the
    rounding of the terms of the loss, if all of it goes one way.

    Raises:
        AssertionError: a bound is too wide to tell two losses apart.
    """
    step = row.make(case)
    condition = step.condition()
    exact = first_step(step)
    dtype = next(step.modules[0].parameters()).dtype
    del step
    moves = [0.0, 0.0]
    for seed in range(draws):
        moved = row.make(case)
        move_weights(moved.modules, seed)
        for place, value in enumerate(first_step(moved)):
            moves[place] = max(moves[place], abs(value - exact[place]))
    own = condition * torch.finfo(dtype).eps
    found = Measured(*(FACTOR * m + own * v for m, v in zip(moves, exact, strict=True)))
    for name, bound, value in zip(Measured._fields, found, exact, strict=True):
        assert bound <= SHARP[dtype] * abs(value), (
            f"rounding may move the {name} of {row.key} at {case.shape} by {bound:.3g} of "
            f"{value:.3g}: too much to compare rows by"
        )
    return exact, found


def check_equal(
    measured: dict[str, Measured], exact: Measured, bound: Measured, where: str
) -> dict[str, float]:
    """See that rows agree.

    Args:
        measured: by row.
        exact: what they should have.
        bound: how far from it they may lie.
        where: for the message.

    Returns:
        The largest distance of a loss and of a gradient, as parts of their bounds.

    Raises:
        AssertionError: naming the first row that lies further off, or is no number.
    """
    largest = dict.fromkeys(Measured._fields, 0.0)
    for name, found in measured.items():
        for kind, value, true, most in zip(largest, found, exact, bound, strict=True):
            distance = abs(value - true)
            # NaN is no distance
            assert distance <= most, (
                f"{where}: the {kind} of {name} is {value:.9g}, but {true:.9g} was expected, give "
                f"or take {most:.2g}; the rows don't make the same step, so nothing is timed"
            )
            largest[kind] = max(largest[kind], distance / most)
    return largest
