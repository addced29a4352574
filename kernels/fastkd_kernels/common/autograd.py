"""What every op shares around its kernels: registration, divisors, unit gradients, shape groups.

A unit gradient is the gradient of the undivided sum, in fp32, made in the forward pass; the
backward multiplies it by `upstream / count` on the device. That of squares is over two, and
multiplied by twice as much.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..types import NAMESPACE

# arguments of a call, or what its backward needs of it, by name
Named = SimpleNamespace


def register(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[[Named], Any],
    keep: Callable[[Named, tuple[Tensor, ...]], Mapping[str, Any]] | None = None,
    gradient: Callable[[Named, Tensor], Mapping[str, Any]] | None = None,
) -> Any:
    """`forward` as an op of torch, whose annotated arguments are the schema: it stands once.

    `fake` makes empty outputs from the arguments by name. The first output is the losses; no other
    has a gradient. `keep` names what the backward needs of arguments and outputs (tensors, lists of
    tensors, plain values). From that and the losses' upstream gradient, `gradient` makes those of
    arguments, by name: a list of tensors may get one tensor, stacked. What it leaves out gets none.
    """
    names = tuple(signature(forward).parameters)

    def named(arguments: Sequence[Any]) -> Named:
        return Named(**dict(zip(names, arguments, strict=True)))

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=())
    op.register_fake(lambda *arguments: fake(named(arguments)))
    if keep is None or gradient is None:
        return op

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.counts = [len(value) if _is_list(value) else None for value in inputs]
        ctx.set_materialize_grads(False)
        tensors: list[Tensor | None] = []
        ctx.kept = {}
        for word, value in keep(named(inputs), output).items():
            if isinstance(value, Tensor) or _is_list(value):
                start = len(tensors)
                tensors += value if _is_list(value) else [value]
                ctx.kept[word] = slice(start, len(tensors)) if _is_list(value) else start
            else:
                ctx.kept[word] = (value,)
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        made: Mapping[str, Any] = {}
        if upstream is not None:
            saved = ctx.saved_tensors
            kept = {
                word: where[0] if isinstance(where, tuple) else saved[where]
                for word, where in ctx.kept.items()
            }
            made = gradient(Named(**kept), upstream)
        given = ((made.get(word), count) for word, count in zip(names, ctx.counts, strict=True))
        return tuple(
            value if count is None else [None] * count if value is None else list(value)
            for value, count in given
        )

    op.register_autograd(backward, setup_context=save)
    return op


def _is_list(value: Any) -> bool:
    """Whether this is a list of tensors."""
    return isinstance(value, (list, tuple)) and all(isinstance(one, Tensor) for one in value)


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
    """Unit gradients `[pairs, ...]` times `factor`, `[pairs]` or `[pairs, batch]`, in `dtype`."""
    factor = factor.view(*factor.shape, *[1] * (unit.ndim - factor.ndim))
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
