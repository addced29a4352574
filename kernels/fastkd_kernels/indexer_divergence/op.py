"""The loss that trains a lightning indexer (DeepSeek-V3.2): KL from attention summed over heads.

Both paths make the scores of a block of query rows, turn them into the loss and at once into unit
gradients, and forget them. The road not taken: a backward that makes the target once more from
kept statistics, which would take all products of the teacher's heads a third time, where the unit
gradient of the queries takes their own memory.

The registered op takes lists over layer pairs of one shape. Soft caps are a list over pairs or
None, sinks `[pairs, heads]` or None.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_mask, resolve_backend
from ..common.autograd import Named, accumulator, by_shape, inverse, register, scaled, value_of
from ..common.counted_rows import counted_rows
from ..common.remembered import remembered
from ..common.rescale import waiting_dtype
from ..types import AttentionState, Backend, IndexerState
from . import torch_path
from .checks import check_indexers
from .torch_path import Pair

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
    alike = check_indexers(student, teacher)
    batch, _, tokens, _ = student[0].query.shape
    device = student[0].query.device
    check_mask("key_mask", key_mask, batch, tokens, device)
    check_mask("query_mask", query_mask, batch, tokens, device)
    floats = [tensor for indexer in student for tensor in (indexer.query, indexer.weights)]
    floats += [state.query for state in teacher]
    chosen = resolve_backend(backend, device, accumulator(*floats))
    row_mask = counted_rows(key_mask, query_mask, causal, 0)

    def loss_of(indexers: Sequence[IndexerState], states: Sequence[AttentionState]) -> Tensor:
        if chosen == "triton":
            _check_index_dim(indexers[0].query.shape[-1])
        dtype = accumulator(indexers[0].query, indexers[0].weights, states[0].query)
        sinks = [state.sinks for state in states if state.sinks is not None]
        need_grad = torch.is_grad_enabled() and any(
            [tensor.requires_grad for indexer in indexers for tensor in indexer]
        )
        made = _registered(
            [indexer.query for indexer in indexers],
            [s.key if s.key.ndim == 4 else s.key[:, None] for s in indexers],
            [indexer.weights for indexer in indexers],
            [state.query for state in states],
            [state.key for state in states],
            [float(state.scale) for state in states],
            key_mask,
            row_mask,
            _inverse_count(row_mask, indexers[0].query, dtype),
            causal,
            None if states[0].softcap is None else [float(s.softcap or 0.0) for s in states],
            torch.stack(sinks).to(dtype) if sinks else None,
            need_grad,
            chosen,
        )
        losses: Tensor = made[0]
        return losses

    keys = None if alike else [_shapes(*pair) for pair in zip(student, teacher, strict=True)]
    loss = by_shape(keys, loss_of, student, teacher)
    wide = torch.float64 in (student[0].query.dtype, student[0].weights.dtype)
    return loss if wide else loss.float()


def _shapes(indexer: IndexerState, state: AttentionState) -> tuple[object, ...]:
    """What pairs must share to run in one call."""
    tensors = (indexer.query, indexer.weights, state.query, state.key)
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    return shapes, state.softcap is None, state.sinks is None


def _inverse_count(row_mask: Tensor | None, query: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the rows that count."""
    batch, _, tokens, _ = query.shape

    def made() -> Tensor:
        count = batch * tokens if row_mask is None else row_mask.sum()
        return inverse(count, dtype, query.device)

    return remembered((row_mask,), ("counted", batch, tokens, dtype), query.device, made)


def _check_index_dim(dim: int) -> None:
    if dim > MAX_INDEX_DIM:
        raise ValueError(
            f"student queries are {dim} wide, too wide for the Triton kernels, which take index "
            f"heads of up to {MAX_INDEX_DIM}; use backend='torch'"
        )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses `[pairs]` and stacked unit gradients of queries, keys and weights."""
    nothing = [None] * len(query)
    lists = (query, key, weights, teacher_query, teacher_key, teacher_scale)
    options = (nothing if of is None else of for of in (teacher_softcap, teacher_sinks))
    pairs = [Pair(*row) for row in zip(*lists, *options, strict=True)]
    call = (pairs, key_mask, row_mask, causal, need_grad)
    if backend == "torch":
        sums, units = torch_path.forward(*call)
    else:
        from . import triton_path

        sums, units = triton_path.forward(*call)
    return value_of(sums, inverse_count), *units


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


_registered = register("indexer_divergence", _forward, _fake, _keep, _gradient)
