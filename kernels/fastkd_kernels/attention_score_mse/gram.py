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


class Blocks(NamedTuple):
    """`own^T own`, `own^T other`, `other^T other` of two column blocks with the same rows."""

    own: Tensor
    cross: Tensor
    other: Tensor


def query_form(query: Tensor, target: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """`(P_0, P_1)`."""
    if not pair.difference:
        return query, target
    return (query * pair.scale).sub_(target, alpha=pair.target_scale), target


def key_form(key: Tensor, target: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """`(R_0, R_1)`."""
    return key, (key - target).mul_(pair.target_scale) if pair.difference else target


def gram_blocks(own: Tensor, other: Tensor) -> Blocks:
    """Blocks of `[groups, rows, own_dim]` and `[groups, rows, other_dim]`."""
    return Blocks(own.mT @ own, own.mT @ other, other.mT @ other)


def squared_norm(
    query: Blocks,
    key: Blocks,
    student_scale: float | Tensor,
    teacher_scale: float | Tensor,
    difference: bool,
) -> Tensor:
    """`|D|^2 = <P^T P, R^T R>` for each leading index: `[...]` from blocks `[..., dim, dim]`."""
    own = (query.own * key.own).sum((-2, -1))
    cross = (query.cross * key.cross).sum((-2, -1))
    other = (query.other * key.other).sum((-2, -1))
    if difference:
        return own + 2 * cross + other
    cross_scale = student_scale * teacher_scale
    return student_scale**2 * own - 2 * cross_scale * cross + teacher_scale**2 * other


def query_factors(
    key: Blocks, student_scale: float | Tensor, teacher_scale: float | Tensor, difference: bool
) -> tuple[Tensor, Tensor]:
    """`(A_0, A_1)` with `c_s D K_s = P_0 A_0 + P_1 A_1`."""
    if difference:
        return student_scale * key.own, student_scale * key.cross.mT
    return student_scale**2 * key.own, -(student_scale * teacher_scale) * key.cross.mT


def key_factors(
    query: Blocks, student_scale: float | Tensor, teacher_scale: float | Tensor, difference: bool
) -> tuple[Tensor, Tensor]:
    """`(B_0, B_1)` with `c_s D^T Q_s = R_0 B_0 + R_1 B_1`."""
    if difference:
        # c_s Q_s = P_0 + c_t P_1, so no division by c_s
        return (
            query.own + teacher_scale * query.cross,
            query.cross.mT + teacher_scale * query.other,
        )
    return student_scale**2 * query.own, -(student_scale * teacher_scale) * query.cross.mT


def stack_factors(factors: tuple[Tensor, Tensor]) -> Tensor:
    """`[..., own_dim + other_dim, own_dim]`: what the backward needs of one side."""
    return torch.cat(factors, dim=-2)
