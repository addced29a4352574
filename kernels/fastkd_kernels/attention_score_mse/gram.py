"""The algebra that turns two small Gram matrices into the loss and both gradients.

One head's difference of scores is `D = a_0 P_0 R_0^T + a_1 P_1 R_1^T`, in one of two forms:

    plain        P = (Q_s, Q_t)                  R = (K_s, K_t)                  a = (c_s, -c_t)
    difference   P = (c_s Q_s - c_t Q_t, Q_t)    R = (K_s, c_t (K_s - K_t))      a = (1, 1)

The difference form needs equal head sizes; every term then shrinks with the distance between
student and teacher, so nothing large cancels. The road not taken: the full Gram of the
concatenated columns, which copies every input and computes mirrored blocks twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.head_groups import Pair


class Gram(NamedTuple):
    """`first^T first`, `first^T second`, `second^T second` of two column parts of the same rows."""

    first: Tensor
    cross: Tensor
    second: Tensor


def query_form(query: Tensor, teacher: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """`(P_0, P_1)`."""
    if not pair.difference:
        return query, teacher
    return (query * pair.scale).sub_(teacher, alpha=pair.teacher_scale), teacher


def key_form(key: Tensor, teacher: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """`(R_0, R_1)`."""
    return key, (key - teacher).mul_(pair.teacher_scale) if pair.difference else teacher


def gram_of(first: Tensor, second: Tensor) -> Gram:
    """Blocks of `[groups, rows, own_dim]` and `[groups, rows, other_dim]`."""
    return Gram(first.mT @ first, first.mT @ second, second.mT @ second)


def squared_norm(
    query: Gram,
    key: Gram,
    student_scale: float | Tensor,
    teacher_scale: float | Tensor,
    difference: bool,
) -> Tensor:
    """`|D|^2 = <P^T P, R^T R>` for each leading index: `[...]` from blocks `[..., dim, dim]`."""
    first = (query.first * key.first).sum((-2, -1))
    cross = (query.cross * key.cross).sum((-2, -1))
    second = (query.second * key.second).sum((-2, -1))
    if difference:
        return first + 2 * cross + second
    cross_scale = student_scale * teacher_scale
    return student_scale**2 * first - 2 * cross_scale * cross + teacher_scale**2 * second


def query_factors(
    key: Gram, student_scale: float | Tensor, teacher_scale: float | Tensor, difference: bool
) -> tuple[Tensor, Tensor]:
    """`(A_0, A_1)` with `c_s D K_s = P_0 A_0 + P_1 A_1`."""
    if difference:
        return student_scale * key.first, student_scale * key.cross.mT
    return student_scale**2 * key.first, -(student_scale * teacher_scale) * key.cross.mT


def key_factors(
    query: Gram, student_scale: float | Tensor, teacher_scale: float | Tensor, difference: bool
) -> tuple[Tensor, Tensor]:
    """`(B_0, B_1)` with `c_s D^T Q_s = R_0 B_0 + R_1 B_1`."""
    if difference:
        # c_s Q_s = P_0 + c_t P_1, so no division by c_s
        return (
            query.first + teacher_scale * query.cross,
            query.cross.mT + teacher_scale * query.second,
        )
    return student_scale**2 * query.first, -(student_scale * teacher_scale) * query.cross.mT


def stack_factors(factors: tuple[Tensor, Tensor]) -> Tensor:
    """`[..., own_dim + other_dim, own_dim]`: what the backward needs of one side."""
    return torch.cat(factors, dim=-2)
