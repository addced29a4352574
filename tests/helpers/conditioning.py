"""Bounds of the kernel tests: what rounding may do to an op's outputs, from its conditioning.

No order of adding products is the right one: it changes with the BLAS, with the kernel that it
picks for a processor, and with the shape of a tile. A bound that was read off one machine holds
there by luck. Here the definition itself runs in fp64, while what every kernel has to round is
rounded at random, in the precision that kernels round it in (Monte Carlo arithmetic; D. S. Parker,
UCLA CSD-970002, 1997). The largest change of a few draws, times `FACTOR`, is the bound.

What is rounded is the little that no order avoids. Sums that cancel in the definition and not in a
kernel (a divergence near its zero) stay exact, so that a kernel that lets them cancel fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Change = Callable[[Tensor], Tensor]
# losses and gradients of a definition whose inputs went through a change to fp64
Define = Callable[[Change], list[Tensor]]

DRAWS = 4
# A loss is one number, whose draws may all be small; roundings of one kernel are not independent.
FACTOR = 4.0
# Three tf32 products keep 22 of the 24 bits of an fp32 operand, and tensor cores cut what they sum.
if torch.cuda.is_available():
    FACTOR *= 2.0
# Times the error of plain PyTorch in the same precision, which is chance too.
OFTEN = 4.0 if torch.cuda.is_available() else 2.0
# A bound above this part of what it bounds would pass a kernel that drops a term.
SHARP = 0.2


class Rounding(TorchDispatchMode):
    """Rounds at random, inside it, what a kernel rounds of a definition in fp64.

    A rounding is half an epsilon of `sums`. What moves, by how many of them:

    * an entry of a product of `d` terms, by `sqrt(d * sum of (a_i b_i)^2)`: `d` roundings of
      partial sums that walk at random. That is at least `sum |a_i b_i|`; the worst case,
      `d sum |a_i b_i|`, takes one accumulator and roundings that agree;
    * a score before its softmax, by `max(1, |score|)`: the score, the maximum taken off it, or its
      exponential is rounded;
    * with `anew` probabilities, in relation, by the largest logarithm of their row: a backward that
      makes scores anew, in other tiles than those of the maximum and sum that it was handed, has
      probabilities that don't add up to 1.

    In the backward, factors of products are rounded to `operands` before, and so are the terms of
    sums over rows: gradients of a bias or of keys that several heads share. Other sums stay exact.
    """

    def __init__(self, sums: torch.dtype, operands: torch.dtype, anew: bool, seed: int) -> None:
        super().__init__()
        self.anew = anew
        self.sums, self.operands = torch.finfo(sums).eps / 2, torch.finfo(operands).eps / 2
        self.generator = torch.Generator().manual_seed(seed)

    def moved(self, value: Tensor, size: Tensor) -> Tensor:
        """Each entry by its `size`, up or down."""
        up = torch.rand(value.shape, generator=self.generator).to(value.device) < 0.5
        return value + torch.where(up, size, -size)

    def input(self, value: Tensor) -> Tensor:
        """An input in fp64, rounded once: for ops that divide or scale it first."""
        exact = value.detach().double()
        return self.moved(exact, self.sums * exact.abs())

    def added(self, total: Tensor, squares: Tensor, terms: int) -> Tensor:
        """A sum of so many terms, of which `squares` is the sum of squares."""
        # below autograd, whose backward is without grad
        operands = 0.0 if torch.is_grad_enabled() else self.operands
        return self.moved(total, (self.sums * terms**0.5 + operands) * squares.sqrt())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_log_softmax":
            scores = args[0]
            size = self.sums * scores.abs().clamp(min=1.0)
            return func(self.moved(scores, size.masked_fill(scores.isinf(), 0.0)), *args[1:])
        if name in ("_log_softmax_backward_data", "exp") and self.anew:
            place = 1 if name == "_log_softmax_backward_data" else 0
            logs = args[place]
            largest = logs.abs().masked_fill(logs.isinf(), 0.0).amax(-1, keepdim=True)
            logs = self.moved(logs, self.sums * largest)
            return func(*args[:place], logs, *args[place + 1 :])
        out = func(*args, **(kwargs or {}))
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            return self.added(out, left.square() @ right.square(), left.shape[-1])
        # of a tensor that was used for every row; along rows a definition's own sums may cancel
        over_rows = name == "sum" and len(args) > 1 and not {-1, args[0].ndim - 1} & set(args[1])
        if over_rows and not torch.is_grad_enabled():
            squares = func(args[0].square(), *args[1:], **(kwargs or {}))
            return self.added(out, squares, args[0].numel() // out.numel())
        return out


def exactly(value: Tensor) -> Tensor:
    return value.detach().double()


def bounds(
    define: Define,
    given: Sequence[Tensor],
    *,
    inputs: bool = False,
    anew: bool = False,
    operands: torch.dtype | None = None,
) -> tuple[list[Tensor], list[float]]:
    """The definition's outputs in fp64, and how far each of `given` may lie from it.

    Distances are norms. `define` gives losses and gradients, from inputs that it puts through what
    it is called with. The dtypes of `given` say what sums and outputs are rounded in; `operands` is
    what products of the backward round theirs to, the gradients' dtype where they share one.
    `inputs` rounds the inputs too; `anew` says that the backward makes scores again.
    """
    kinds = {value.dtype for value in given[1:]}
    sums = given[0].dtype
    used = operands or (kinds.pop() if len(kinds) == 1 else sums)
    exact = define(exactly)
    # the last sums and factors: two roundings of the output itself
    moves = [torch.finfo(sums).eps * float(value.norm()) for value in exact]
    # a forward makes its scores once
    for draw, first in product(range(DRAWS), (0, 1) if anew else (0,)):
        with Rounding(sums, used, bool(first), draw) as rounding:
            made = define(rounding.input if inputs else exactly)
        for place in range(first, 1 if anew and not first else len(exact)):
            moves[place] = max(moves[place], float((made[place] - exact[place]).norm()))
    stored = [_stored(own, true) for own, true in zip(given, exact, strict=True)]
    return exact, [FACTOR * move + last for move, last in zip(moves, stored, strict=True)]


def _stored(given: Tensor, exact: Tensor) -> float:
    """The most that storing `exact` in the dtype of `given` does: near 0, numbers are even."""
    kind = torch.finfo(given.dtype)
    return kind.eps / 2 * (float(exact.norm()) + kind.tiny * exact.numel() ** 0.5)


class PlainRounding(TorchDispatchMode):
    """Rounds, inside it, the logarithms of a softmax one by one, as plain PyTorch in fp32 does.

    They no longer belong to probabilities that add up to 1, so that near the teacher a divergence
    keeps terms of first order: what kernels are there to avoid.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rounding = Rounding(torch.float32, torch.float32, False, seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ != "_log_softmax":
            return out
        return self.rounding.moved(out, self.rounding.sums * out.abs())


def plain_loss_error(define: Define) -> float:
    """How far plain PyTorch in fp32 may be from the losses: the largest of a few draws."""
    exact = define(exactly)[0]
    found = 0.0
    for draw in range(DRAWS):
        with PlainRounding(draw):
            found = max(found, distance(define(exactly)[0], exact))
    return found


def check_rounding(
    define: Define,
    given: Sequence[Tensor],
    *,
    plain: Sequence[Tensor] | None = None,
    often: float = OFTEN,
    scales: Sequence[Tensor] | None = None,
    **options: Any,
) -> None:
    """`given` is the definition's but for rounding, by bounds that say something.

    With `plain`, the definition in the precision of the inputs, or but for `often` its error.
    `scales` are what the bounds are held against where the outputs vanish.
    """
    exact, limits = bounds(define, given, **options)
    for number, (own, true, limit) in enumerate(zip(given, exact, limits, strict=True)):
        scale = float((true if scales is None else scales[number]).double().norm())
        sharp = SHARP * scale + torch.finfo(own.dtype).tiny
        assert limit <= sharp, f"output {number}: {limit} bounds nothing of size {scale}"
        theirs = 0.0 if plain is None else often * distance(plain[number], true)
        error = distance(own, true)
        # NaN is no distance at all
        assert error <= max(theirs, limit), f"output {number}: {error} above {theirs}, {limit}"


def check_within(given: Sequence[Tensor], other: Sequence[Tensor], limits: Sequence[float]) -> None:
    """Two ways to the same outputs: no farther apart than both may lie from the definition."""
    for number, (own, another, limit) in enumerate(zip(given, other, limits, strict=True)):
        assert limit <= SHARP * float(another.double().norm()), f"output {number}: {limit}"
        assert distance(own, another.double()) <= 2 * limit, f"output {number}"


def distance(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact.to(given.device)).norm())
