"""The loss that trains a lightning indexer (DeepSeek-V3.2): KL from attention summed over heads.

Both paths make the scores of a block of query rows, turn them into the loss and at once into unit
gradients, and forget them. The road not taken: a backward that makes the target once more from
kept statistics, which would take all products of the teacher's heads a third time, where the unit
gradient of the queries takes their own memory.

The registered op takes lists over layer pairs of one shape. Soft caps are a list over pairs or
None, sinks `[pairs, heads]` or None.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import check_flag, check_mask, resolve_backend
from ..common.attention_columns import Masks
from ..common.autograd import Named, accumulator, inverse, planned, register, scaled, value_of
from ..common.counted_rows import counted_rows
from ..common.plan import Plan, losses_in, plan_by_shape, plan_for
from ..common.remembered import remembered
from ..common.rescale import waiting_dtype
from ..types import AttentionState, Backend, IndexerState
from . import torch_path
from .checks import Columns, check_indexers, columns_of, look_at_indexers
from .torch_path import Pair, Units

MAX_INDEX_DIM = 256


def indexer_divergence(
    student: Sequence[IndexerState],
    teacher: Sequence[AttentionState],
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Mean KL of each indexer from the attention of its layer (DeepSeek-V3.2, arXiv 2512.02556,
    section 2.1, the dense warm-up).

    Of a row that sees the keys `s`, and the teacher's heads with scores `a`,

    * a head's probabilities are `exp(a[s]) / (sum of exp(a) + exp(sink))`, where the sink (GPT-OSS,
      arXiv 2508.10925) is left out if there is none;
    * `target[s]` is the sum of these over the heads, divided by its own sum over the keys: a head
      whose sink takes most of a row counts for less in that row.

    The indexer's scores are `I[s] = sum_h weights[h] * relu(query[h] @ key[s])`, and the value of a
    row is `sum target * log(target / softmax(I))`.

    Args:
        student: One `IndexerState` a pair, on one device, in bf16, fp16, fp32 or fp64, with any
            strides. Queries and key share a dtype; weights may have another.
        teacher: One `AttentionState` a pair, of the same batch and tokens. Heads, key heads, head
            sizes and dtypes are its own. `softcap` caps its scores. Values are not read.
        key_mask: Bool `[batch, tokens]`, True at keys that rows can see; None is all of them.
        query_mask: Bool `[batch, tokens]`, True at query rows that count; None is all of them, also
            where `key_mask` is given.
        causal: Rows see keys at or before themselves only; the default here, as indexers select
            keys of the past.
        backend: "auto" runs Triton on CUDA, PyTorch on the CPU and for fp64.

    Returns:
        `[pairs]` in fp32 (fp64 where an indexer is fp64): the mean over the counted rows that see
        at least one key (a sink is none). Gradients reach queries, key and weights of the indexer
        only. Without any such row the loss and its gradients are 0.

    Raises:
        ValueError: shapes or devices that do not fit, or a teacher that requires grad.
        TypeError: something that is no state, no float tensor or no bool mask.
    """
    masks = (key_mask, query_mask)
    seen = look_at_indexers(student, teacher, masks, causal, backend)
    look = None if seen is None else seen.look
    plan = plan_for(look, partial(_checked_plan, student, teacher, masks, causal, backend))
    columns = columns_of(student, teacher) if seen is None else seen.columns
    losses: Tensor = plan(columns, masks)
    return losses


def _checked_plan(
    student: Sequence[IndexerState],
    teacher: Sequence[AttentionState],
    masks: Masks,
    causal: bool,
    backend: str,
) -> Plan:
    """Losses `[pairs]` of columns and masks that look like those of this call, if all fits."""
    check_indexers(student, teacher)
    batch, _, tokens, _ = student[0].query.shape
    device = student[0].query.device
    check_mask("key_mask", masks[0], batch, tokens, device)
    check_mask("query_mask", masks[1], batch, tokens, device)
    check_flag("causal", causal)
    floats = [tensor for indexer in student for tensor in (indexer.query, indexer.weights)]
    floats += [state.query for state in teacher]
    chosen = resolve_backend(backend, device, accumulator(*floats))
    keys = [_shapes(*pair) for pair in zip(student, teacher, strict=True)]
    plan_of = partial(_plan, causal, chosen)
    plan = plan_by_shape(keys, plan_of, columns_of(student, teacher), masks)
    return losses_in(plan, accumulator(student[0].query, student[0].weights))


def _plan(causal: bool, backend: str, columns: Columns, masks: Masks) -> Plan:
    """Losses `[pairs]` of columns and masks that look like these, of pairs of one shape."""
    query = columns.query[0]
    if backend == "triton":
        _check_index_dim(query.shape[-1])
    dtype = accumulator(query, columns.weights[0], columns.teacher_query[0])
    need_grad = torch.is_grad_enabled() and any(
        [tensor.requires_grad for column in columns[:3] for tensor in column]
    )
    scales = [*map(float, columns.teacher_scale)]
    caps = [float(cap) for cap in columns.teacher_softcap if cap is not None] or None
    count = partial(_inverse_count, (query.shape[0], query.shape[2]), dtype, query.device)

    def arguments(columns: Columns, masks: Masks) -> tuple[Any, ...]:
        row_mask = counted_rows(*masks, causal, 0)
        sinks = [one for one in columns.teacher_sinks if one is not None]
        return (
            columns.query,
            columns.key,
            columns.weights,
            columns.teacher_query,
            columns.teacher_key,
            scales,
            masks[0],
            row_mask,
            count(row_mask),
            causal,
            caps,
            torch.stack(sinks).to(dtype) if sinks else None,
            need_grad,
            backend,
        )

    run = divergence.planned(arguments(columns, masks))
    return lambda columns, masks: run(arguments(columns, masks))[0]


def _shapes(indexer: IndexerState, state: AttentionState) -> tuple[object, ...]:
    """What pairs must share to run in one call."""
    tensors = (indexer.query, indexer.key, indexer.weights, state.query, state.key)
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    return shapes, state.softcap is None, state.sinks is None


def _inverse_count(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, row_mask: Tensor | None
) -> Tensor:
    """One over the rows that count, of `shape`: batch and tokens."""

    def made() -> Tensor:
        count = shape[0] * shape[1] if row_mask is None else row_mask.sum()
        return inverse(count, dtype, device)

    return remembered((row_mask,), ("counted", shape, dtype), device, made)


def _check_index_dim(dim: int) -> None:
    if dim > MAX_INDEX_DIM:
        raise ValueError(
            f"student queries are {dim} wide, too wide for the Triton kernels, which take index "
            f"heads of up to {MAX_INDEX_DIM}; use backend='torch'"
        )


# where the op's arguments stand; lists are tensors and the teacher's scales
TENSORS, LISTS, KEYS = slice(0, 5), slice(0, 6), 1
REST = slice(6, None)
MASKS, INVERSE_COUNT, SINKS = slice(6, 8), 8, 11


@planned
def _forward(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    weights: Sequence[Tensor],
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Sequence[float],
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    inverse_count: Tensor,
    causal: bool,
    teacher_softcap: Sequence[float] | None,
    teacher_sinks: Tensor | None,
    need_grad: bool,
    backend: str,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Losses `[pairs]` and stacked unit gradients of queries, keys and weights.

    Keys are `[batch, 1, tokens, dim]` or `[batch, tokens, dim]`, as their gradients are.
    """
    if backend == "torch":
        return _torch_forward
    from . import triton_path

    tensors = (query, key, weights, teacher_query, teacher_key)
    pairs = _pairs((*tensors, teacher_scale), (teacher_softcap, teacher_sinks))
    masked = key_mask is not None or row_mask is not None
    plan = triton_path.forward(pairs, masked, causal, need_grad)

    def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sums, units = plan(arguments[TENSORS], arguments[SINKS], arguments[MASKS])
        losses = value_of(sums, arguments[INVERSE_COUNT])
        return losses, *_like_keys(units, arguments[KEYS])

    return run


def _torch_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *masks, inverse_count, causal, caps, sinks, need_grad, _ = arguments[REST]
    pairs = _pairs(arguments[LISTS], (caps, sinks))
    sums, units = torch_path.forward(pairs, masks[0], masks[1], causal, need_grad)
    return value_of(sums, inverse_count), *_like_keys(units, arguments[KEYS])


def _like_keys(units: Units, keys: Sequence[Tensor]) -> Units:
    """The gradient of keys in the shape that these have."""
    if not units.key.numel():
        return units
    return units._replace(key=units.key.view(len(keys), *keys[0].shape))


def _pairs(lists: Sequence[Sequence[Any]], options: Sequence[Any]) -> list[Pair]:
    """Pairs from lists, and from caps and sinks that may be None."""
    nothing = [None] * len(lists[0])
    query, key, *rest = lists
    keys = [one if one.ndim == 4 else one[:, None] for one in key]
    columns = (query, keys, *rest, *(nothing if of is None else of for of in options))
    return [Pair(*row) for row in zip(*columns, strict=True)]


def _fake(given: Named) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs, new = len(given.query), given.inverse_count.new_empty
    made = [new(0) for _ in range(3)]
    if given.need_grad:
        made = [new((pairs, *of[0].shape)) for of in (given.query, given.key, given.weights)]
        if given.backend == "triton":
            made[0] = made[0].to(waiting_dtype(given.query[0].dtype))
    return new(pairs), made[0], made[1], made[2]


def _keep(given: Named, made: tuple[Tensor, ...]) -> dict[str, Any]:
    dtypes = [of[0].dtype for of in (given.query, given.key, given.weights)]
    return {"inverse_count": given.inverse_count, "units": made[1:], "dtypes": dtypes}


def _gradient(kept: Named, upstream: Tensor) -> dict[str, Any]:
    factor = upstream * kept.inverse_count
    names = ("query", "key", "weights")
    made = zip(kept.units, kept.dtypes, strict=True)
    return {
        name: scaled(unit, factor, dtype) for name, (unit, dtype) in zip(names, made, strict=True)
    }


divergence = register("indexer_divergence", _forward, _fake, _keep, _gradient)
