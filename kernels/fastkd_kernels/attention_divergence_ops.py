"""The registered ops of attention_divergence: schemas, fake functions and autograd.

"one_sweep" (PyTorch) makes unit gradients in the forward; "stream" (Triton) keeps four or five
floats a query row, and a backward of its own makes the tiles once more. Both take lists over layer
pairs of one shape. `window` 0 is none. Soft caps are a list over pairs or None, sinks
`[pairs, heads]` or None; both come divided by the temperature, as scales do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention_divergence_torch as on_torch
from .attention_divergence_launch import row_stats
from .head_groups import Pair, pairs_of, student_gradients
from .types import NAMESPACE
from .unit_gradient import scaled, value_of


def _pairs(lists: Sequence[Sequence[Any]], options: Sequence[Any]) -> list[Pair]:
    """Pairs from an op's lists, and from caps and sinks that may be None."""
    nothing = [None] * len(lists[0])
    return pairs_of(*lists, *(nothing if option is None else option for option in options))


def _sinks_shape(sinks: Tensor | None) -> tuple[int, ...]:
    return (0,) if sinks is None else tuple(sinks.shape)


def _gradients(made: Sequence[Tensor] | None, pairs: int, has_sinks: bool) -> tuple[Any, ...]:
    """Gradients in the order of the inputs: of queries, keys and, where there are some, sinks."""
    if made is None:
        return student_gradients(None, pairs, 13)
    query, key, sinks = made
    given = student_gradients((query, key), pairs, 10)
    return (*given, sinks if has_sinks else None, None, None)


@torch.library.custom_op(f"{NAMESPACE}::attention_divergence_one_sweep", mutates_args=())
def one_sweep(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    rows: Tensor | None,
    inverse_count: Tensor,
    kind: str,
    causal: bool,
    window: int,
    student_softcap: Sequence[float] | None,
    teacher_softcap: Sequence[float] | None,
    student_sinks: Tensor | None,
    teacher_sinks: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses `[pairs]` and stacked unit gradients of the student's queries, keys and sinks."""
    pairs = _pairs(
        (query, key, target_query, target_key, scale, target_scale),
        (student_softcap, teacher_softcap, student_sinks, teacher_sinks),
    )
    sums, *units = on_torch.one_sweep(pairs, key_mask, rows, kind, causal, window, need_grad)
    query_unit, key_unit, sink_unit = units
    return value_of(sums, inverse_count), query_unit, key_unit, sink_unit


@one_sweep.register_fake
def _one_sweep_fake(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    rows: Tensor | None,
    inverse_count: Tensor,
    kind: str,
    causal: bool,
    window: int,
    student_softcap: Sequence[float] | None,
    teacher_softcap: Sequence[float] | None,
    student_sinks: Tensor | None,
    teacher_sinks: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = len(query)
    return (
        inverse_count.new_empty(pairs),
        inverse_count.new_empty((pairs, *query[0].shape) if need_grad else (0,)),
        inverse_count.new_empty((pairs, *key[0].shape) if need_grad else (0,)),
        inverse_count.new_empty(_sinks_shape(student_sinks) if need_grad else (0,)),
    )


def _one_sweep_save(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    ctx.dtype, ctx.pairs, ctx.has_sinks = inputs[0][0].dtype, len(inputs[0]), inputs[14] is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], inputs[8])


def _one_sweep_gradient(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if upstream is None:
        return _gradients(None, ctx.pairs, ctx.has_sinks)
    query_unit, key_unit, sink_unit, inverse_count = ctx.saved_tensors
    factor = inverse_count * upstream
    made = [scaled(query_unit, factor, ctx.dtype), scaled(key_unit, factor, ctx.dtype)]
    made.append(scaled(sink_unit, factor, sink_unit.dtype) if ctx.has_sinks else sink_unit)
    return _gradients(made, ctx.pairs, ctx.has_sinks)


one_sweep.register_autograd(_one_sweep_gradient, setup_context=_one_sweep_save)


@torch.library.custom_op(f"{NAMESPACE}::attention_divergence_stream", mutates_args=())
def stream(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    rows: Tensor | None,
    inverse_count: Tensor,
    kind: str,
    causal: bool,
    window: int,
    student_softcap: Sequence[float] | None,
    teacher_softcap: Sequence[float] | None,
    student_sinks: Tensor | None,
    teacher_sinks: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Losses `[pairs]` and what the backward keeps of each query row."""
    from . import attention_divergence_triton as on_triton

    pairs = _pairs(
        (query, key, target_query, target_key, scale, target_scale),
        (student_softcap, teacher_softcap, student_sinks, teacher_sinks),
    )
    sums, stats = on_triton.stream(pairs, key_mask, rows, kind, causal, window, need_grad)
    return value_of(sums, inverse_count), stats


@stream.register_fake
def _stream_fake(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    rows: Tensor | None,
    inverse_count: Tensor,
    kind: str,
    causal: bool,
    window: int,
    student_softcap: Sequence[float] | None,
    teacher_softcap: Sequence[float] | None,
    student_sinks: Tensor | None,
    teacher_sinks: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    shape = (len(query), row_stats(kind), *query[0].shape[:3])
    return (
        inverse_count.new_empty(len(query)),
        inverse_count.new_empty(shape if need_grad else (0,)),
    )


@torch.library.custom_op(f"{NAMESPACE}::attention_divergence_stream_backward", mutates_args=())
def _stream_backward(
    factor: Tensor,
    stats: Tensor,
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    rows: Tensor | None,
    kind: str,
    causal: bool,
    window: int,
    student_softcap: Sequence[float] | None,
    teacher_softcap: Sequence[float] | None,
    student_sinks: Tensor | None,
    teacher_sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked gradients of the student's queries, keys and sinks for `factor` `[pairs]`."""
    from . import attention_divergence_triton as on_triton

    pairs = _pairs(
        (query, key, target_query, target_key, scale, target_scale),
        (student_softcap, teacher_softcap, student_sinks, teacher_sinks),
    )
    return on_triton.stream_backward(factor, stats, pairs, key_mask, rows, kind, causal, window)


@_stream_backward.register_fake
def _stream_backward_fake(
    factor: Tensor,
    stats: Tensor,
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    target_query: Sequence[Tensor],
    target_key: Sequence[Tensor],
    scale: Sequence[float],
    target_scale: Sequence[float],
    key_mask: Tensor | None,
    rows: Tensor | None,
    kind: str,
    causal: bool,
    window: int,
    student_softcap: Sequence[float] | None,
    teacher_softcap: Sequence[float] | None,
    student_sinks: Tensor | None,
    teacher_sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = len(query)
    return (
        query[0].new_empty((pairs, *query[0].shape)),
        key[0].new_empty((pairs, *key[0].shape)),
        factor.new_empty(_sinks_shape(student_sinks)),
    )


def _stream_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, target_query, target_key, ctx.scale, ctx.target_scale = inputs[:6]
    key_mask, rows, inverse_count, ctx.kind, ctx.causal, ctx.window = inputs[6:12]
    ctx.student_softcap, ctx.teacher_softcap, *sinks = inputs[12:16]
    ctx.set_materialize_grads(False)
    lists = (*query, *key, *target_query, *target_key)
    ctx.save_for_backward(output[1], inverse_count, key_mask, rows, *sinks, *lists)


def _stream_gradient(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    pairs = len(ctx.scale)
    if upstream is None:
        return _gradients(None, pairs, has_sinks=False)
    stats, inverse_count, key_mask, rows, *sinks = ctx.saved_tensors[:6]
    tensors = ctx.saved_tensors[6:]
    made = _stream_backward(
        inverse_count * upstream,
        stats,
        *(tensors[start : start + pairs] for start in range(0, 4 * pairs, pairs)),
        ctx.scale,
        ctx.target_scale,
        key_mask,
        rows,
        ctx.kind,
        ctx.causal,
        ctx.window,
        ctx.student_softcap,
        ctx.teacher_softcap,
        *sinks,
    )
    return _gradients(made, pairs, sinks[0] is not None)


stream.register_autograd(_stream_gradient, setup_context=_stream_save)
