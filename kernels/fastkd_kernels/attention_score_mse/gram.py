"""The algebra that turns two small Gram matrices into the loss and both gradients.

One head's difference of scores is `D = a_0 P_0 R_0^T + a_1 P_1 R_1^T`, in one of two forms:

    plain        P = (Q_s, Q_t)                  R = (K_s, K_t)                  a = (c_s, -c_t)
    difference   P = (c_s Q_s - c_t Q_t, Q_t)    R = (K_s, c_t (K_s - K_t))      a = (1, 1)

The difference form needs equal head sizes; every term then shrinks with the distance between
student and teacher, so nothing large cancels. A Gram is that of both parts side by side, `[width,
width]`. The road not taken: the product of concatenated columns, which copies every input and
computes mirrored blocks twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.head_groups import Pair


def query_form(query: Tensor, teacher: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """`(P_0, P_1)`."""
    if not pair.difference:
        return query, teacher
    return (query * pair.scale).sub_(teacher, alpha=pair.teacher_scale), teacher


def key_form(key: Tensor, teacher: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """`(R_0, R_1)`."""
    return key, (key - teacher).mul_(pair.teacher_scale) if pair.difference else teacher


def gram_of(first: Tensor, second: Tensor) -> Tensor:
    """Gram `[groups, width, width]` of `[groups, rows, dim]` beside `[groups, rows, other_dim]`."""
    cross = first.mT @ second
    above, below = (first.mT @ first, cross), (cross.mT, second.mT @ second)
    return torch.cat([torch.cat(above, -1), torch.cat(below, -1)], -2)


def mirror(grams: Tensor, dim: int) -> None:
    """Fill the block of part 1 by part 0, of Grams whose part 0 has `dim` columns."""
    grams[..., dim:, :dim] = grams[..., :dim, dim:].mT


class Algebra(NamedTuple):
    """What makes loss and factors of whole Grams `[..., width, width]`, for one pair or many.

    Scales are numbers, or tensors that go with Grams; `weights` `[..., width, 1]` are `a` of each
    column, None in the difference form, where all are 1.
    """

    dim: int
    student_scale: float | Tensor
    teacher_scale: float | Tensor
    weights: Tensor | None

    def squared_norms(self, query: Tensor, key: Tensor) -> Tensor:
        """Entries `[..., width, width]` whose sum is `|D|^2 = <a P^T P a, R^T R>`."""
        entries = query * key
        return entries if self.weights is None else entries.mul_(self.weights).mul_(self.weights.mT)

    def query_factors(self, key: Tensor) -> Tensor:
        """`A` `[..., width, dim]` with `c_s D K_s = P A`."""
        first = key[..., : self.dim] * self.student_scale
        return first if self.weights is None else first.mul_(self.weights)

    def key_factors(self, query: Tensor) -> Tensor:
        """`B` `[..., width, dim]` with `c_s D^T Q_s = R B`."""
        first = query[..., : self.dim]
        if self.weights is None:
            # c_s Q_s = P_0 + c_t P_1, so no division by c_s
            return first + self.teacher_scale * query[..., self.dim :]
        return (first * self.student_scale).mul_(self.weights)


def pair_algebra(pair: Pair, like: Tensor) -> Algebra:
    """That of one pair, whose Grams are like `like`."""
    dim, teacher_dim = pair.query.shape[-1], pair.teacher_query.shape[-1]
    weights = None
    if not pair.difference:
        weights = like.new_full((dim + teacher_dim, 1), pair.scale)
        weights[dim:] = -pair.teacher_scale
    return Algebra(dim, pair.scale, pair.teacher_scale, weights)


def stacked_algebra(
    scales: Tensor, dims: tuple[int, int], difference: bool, between: int
) -> Algebra:
    """That of pairs with `scales` `[pairs, 2]` and Grams `[pairs, ..., width, width]`, with as many
    dimensions `between`."""
    ones = (1,) * between
    student, teacher = (column.view(-1, *ones, 1, 1) for column in scales.unbind(1))
    weights = None
    if not difference:
        sides = (student, -teacher)
        weights = torch.cat(
            [side.expand(*side.shape[:-2], dim, 1) for side, dim in zip(sides, dims, strict=True)],
            -2,
        )
    return Algebra(dims[0], student, teacher, weights)
