"""What every op shares around its kernels: divisors on the device, unit gradients, shape groups.

A unit gradient is the gradient of the undivided sum over two, in fp32, made in the forward pass;
the backward multiplies it by `2 * upstream / count` on the device.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    """fp64 where an input is fp64, fp32 otherwise."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def inverse(count: Tensor | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`1 / count` as a scalar on `device`, and 0 where nothing is counted."""
    if isinstance(count, int):
        return torch.full((), 1.0 / count if count else 0.0, dtype=dtype, device=device)
    return torch.where(count > 0, 1.0 / count.clamp(min=1).to(dtype), 0.0).to(dtype)


def value_of(squares: Tensor, inverse_count: Tensor) -> Tensor:
    """Loss `[pairs]` from sums of squares, which rounding can leave slightly below 0."""
    return squares.clamp(min=0.0) * inverse_count


def squared_sum(value: Tensor) -> Tensor:
    """Sum of squares, without a squared copy.

    Row by row, because one running fp32 sum over a million entries loses 1e-5 of itself.
    """
    rows: Tensor = torch.linalg.vector_norm(value, dim=-1)
    return rows.square().sum()


def scaled(unit: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit gradients `[pairs, ...]` times `factor` `[pairs]`, in the dtype of the input."""
    factor = factor.view(-1, *[1] * (unit.ndim - 1))
    if unit.dtype == dtype or (torch.is_grad_enabled() and factor.requires_grad):
        return (unit * factor).to(dtype)
    # one pass, without a product in fp32
    return torch.mul(unit, factor, out=torch.empty_like(unit, dtype=dtype))


def by_shape(keys: Sequence[Hashable], loss_of: Callable[[list[int]], Tensor]) -> Tensor:
    """`[pairs]` losses from one call of `loss_of` for each set of pairs with the same key.

    Layers of one model share their shapes, so this is one call in practice.
    """
    members: dict[Hashable, list[int]] = {}
    for pair, key in enumerate(keys):
        members.setdefault(key, []).append(pair)
    if len(members) == 1:
        return loss_of(list(range(len(keys))))
    order = [pair for group in members.values() for pair in group]
    losses = torch.cat([loss_of(group) for group in members.values()])
    if order == sorted(order):
        return losses
    return torch.stack([losses[order.index(pair)] for pair in range(len(keys))])
