"""The registered ops of attention_score_mse: schemas, fake functions and autograd.

"one_pass" makes unit gradients in the forward. "gram", on Triton alone, keeps small factors for a
backward of its own. Both take lists over layer pairs of one shape.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention_score_mse_torch as on_torch
from .head_groups import pairs_of, student_gradients
from .types import NAMESPACE
from .unit_gradient import scaled, value_of


def _path(backend: str) -> Any:
    """The module that computes; Triton is imported by the first call that needs it."""
    if backend == "torch":
        return on_torch
    from . import attention_score_mse_triton

    return attention_score_mse_triton


@torch.library.custom_op(f"{NAMESPACE}::attention_score_mse_gram", mutates_args=())
def gram(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    inverse_count: Tensor,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[pairs]` and the factors that the backward applies (see `gram.py`)."""
    pairs = pairs_of(query, key, target_query, target_key, scale, target_scale)
    squares, to_query, to_key = _path("triton").gram_forward(pairs, key_mask, query_mask, need_grad)
    return value_of(squares, inverse_count), to_query, to_key


@gram.register_fake
def _gram_fake(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    inverse_count: Tensor,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, _, dim = query[0].shape
    groups = math.lcm(key[0].shape[1], target_key[0].shape[1])
    shape = (len(query), batch, groups, dim + target_query[0].shape[-1], dim)
    made = shape if need_grad else (0,)
    return (
        inverse_count.new_empty(len(query)),
        inverse_count.new_empty(made),
        inverse_count.new_empty(made),
    )


@torch.library.custom_op(f"{NAMESPACE}::attention_score_mse_gram_backward", mutates_args=())
def _gram_backward(
    factor: Tensor,
    to_query: Tensor,
    to_key: Tensor,
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Stacked gradients of the student's queries and keys for `factor` `[pairs]`."""
    pairs = pairs_of(query, key, target_query, target_key, scale, target_scale)
    query_grad, key_grad = _path("triton").gram_backward(
        factor, to_query, to_key, pairs, key_mask, query_mask
    )
    return query_grad, key_grad


@_gram_backward.register_fake
def _gram_backward_fake(
    factor: Tensor,
    to_query: Tensor,
    to_key: Tensor,
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    pairs = len(query)
    return (
        torch.empty((pairs, *query[0].shape), dtype=query[0].dtype, device=query[0].device),
        torch.empty((pairs, *key[0].shape), dtype=key[0].dtype, device=key[0].device),
    )


def _gram_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, target_query, target_key, ctx.scale, ctx.target_scale = inputs[:6]
    key_mask, query_mask, inverse_count, _ = inputs[6:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *output[1:], inverse_count, key_mask, query_mask, *query, *key, *target_query, *target_key
    )


def _gram_gradient(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if upstream is None:
        return student_gradients(None, len(ctx.scale), 6)
    to_query, to_key, inverse_count, key_mask, query_mask, *tensors = ctx.saved_tensors
    pairs = len(tensors) // 4
    lists = [tensors[start : start + pairs] for start in range(0, 4 * pairs, pairs)]
    query_grad, key_grad = _gram_backward(
        2.0 * inverse_count * upstream,
        to_query,
        to_key,
        *lists,
        ctx.scale,
        ctx.target_scale,
        key_mask,
        query_mask,
    )
    return student_gradients((query_grad, key_grad), len(ctx.scale), 6)


gram.register_autograd(_gram_gradient, setup_context=_gram_save)


@torch.library.custom_op(f"{NAMESPACE}::attention_score_mse_one_pass", mutates_args=())
def one_pass(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    inverse_count: Tensor,
    causal: bool,
    algorithm: str,
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[pairs]` and stacked unit gradients of the student's queries and keys."""
    pairs = pairs_of(query, key, target_query, target_key, scale, target_scale)
    squares, query_unit, key_unit = _path(backend).one_pass(
        pairs, key_mask, query_mask, causal, algorithm, need_grad
    )
    return value_of(squares, inverse_count), query_unit, key_unit


@one_pass.register_fake
def _one_pass_fake(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    inverse_count: Tensor,
    causal: bool,
    algorithm: str,
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = len(query)
    return (
        inverse_count.new_empty(pairs),
        inverse_count.new_empty((pairs, *query[0].shape) if need_grad else (0,)),
        inverse_count.new_empty((pairs, *key[0].shape) if need_grad else (0,)),
    )


def _one_pass_save(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.dtype, ctx.pairs = inputs[0][0].dtype, len(inputs[0])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], inputs[8])


def _one_pass_gradient(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if upstream is None:
        return student_gradients(None, ctx.pairs, 9)
    query_unit, key_unit, inverse_count = ctx.saved_tensors
    factor = 2.0 * inverse_count * upstream
    query_grad = scaled(query_unit, factor, ctx.dtype)
    key_grad = scaled(key_unit, factor, ctx.dtype)
    return student_gradients((query_grad, key_grad), ctx.pairs, 9)


one_pass.register_autograd(_one_pass_gradient, setup_context=_one_pass_save)
