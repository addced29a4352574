"""Divergences of attention probabilities in linear memory: KL, reverse KL, JS, MSE, cosine, CE.

Rows are reduced while they stream past, as in flash attention (arXiv 2205.14135), so no map of
`[tokens, tokens]` is ever stored. The forward makes loss and gradients: a sequence that fits one
program is read once; of a longer one tiles are made three times, for the rows' log-sum-exps, and
for either gradient. The road not taken: gradients made in a backward of their own from statistics
of the rows, which made every tile of a short sequence three times too.

The registered op takes lists over layer pairs of one shape. `window` 0 is none. Soft caps are a
list over pairs or None, sinks `[pairs, heads]` or None; both come divided by the temperature, as
scales do.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from ..checks import (
    check_caps_and_sinks,
    check_choice,
    check_flag,
    check_mask,
    check_states,
    check_temperature,
    look_at_states,
    resolve_backend,
)
from ..common.attention_columns import Columns, Masks, columns_of
from ..common.autograd import Named, accumulator, inverse, planned, register, scaled
from ..common.counted_rows import counted_rows
from ..common.head_groups import Pair, pairs_of, state_shapes
from ..common.plan import Plan, losses_in, plan_by_shape, plan_for
from ..common.remembered import remembered
from ..common.rescale import rescaled, stacked_gradient, waiting_dtype
from ..types import (
    AttentionDivergenceKind,
    AttentionReduction,
    AttentionState,
    Backend,
)
from . import torch_path

MAX_HEAD_DIM = 256


def attention_divergence(
    student: Sequence[AttentionState],
    teacher: Sequence[AttentionState],
    *,
    kind: AttentionDivergenceKind = "kl",
    temperature: float = 1.0,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    reduction: AttentionReduction = "tokens",
    backend: Backend = "auto",
) -> Tensor:
    """Mean divergence of the attention probabilities of each layer pair.

    `p_s` and `p_t` are `softmax(scale * query @ key^T / temperature)` over the keys that a query
    row sees. A `softcap` (Gemma 2, arXiv 2408.00118, section 2) makes `softcap * tanh(score /
    softcap)` of the scores before the temperature divides them. With `sinks` (GPT-OSS, arXiv
    2508.10925) a logit of the head, divided by the temperature too, joins the softmax of every row:
    the sink is then one more outcome that is compared, as a key would be.

    "kl" is the attention transfer of MiniLM (arXiv 2002.10957, section 3.1). A row:

    * "kl": `sum p_t (log p_t - log p_s)`; "reverse_kl": `sum p_s (log p_s - log p_t)`
    * "js": half of both KL divergences from the even mixture of `p_s` and `p_t`
    * "mse": `sum (p_s - p_t)^2`, a sum over keys, not a mean; "cosine": `1 - cos(p_s, p_t)`
    * "cross_entropy": `-sum p_t log p_s`

    There is no factor of `temperature ** 2`; multiply the loss by it where gradients should not
    shrink with the temperature.

    Args:
        student, teacher: One `AttentionState` a pair, on one device. Queries are
            `[batch, heads, tokens, head_dim]` and keys `[batch, kv_heads, tokens, head_dim]` in
            bf16, fp16, fp32 or fp64, with any strides. Head counts of a pair agree; head sizes,
            key heads and dtypes may differ. Values are not read. Soft caps are finite, above 0,
            and may differ or be absent. Sinks are `[heads]` in any of these dtypes, on both sides
            of a pair or on neither.
        kind: The divergence.
        temperature: Divides the capped scores and the sinks of both sides; from 0.001 to 1000.
        key_mask: Bool `[batch, tokens]`, True at keys that rows can see; None is all of them.
        query_mask: Bool `[batch, tokens]`, True at query rows that count; None is all of them, also
            where `key_mask` is given.
        causal: Rows see keys at or before themselves only.
        window: Rows see keys with `|query - key| < window` only, together with `causal` where both
            are given. This is the `sliding_window` that transformers hands to attention functions:
            with `causal` the keys above `query - window`, and for ModernBERT half of
            `local_attention`, plus one. None is no window.
        reduction: "tokens" is the mean over heads and all counted rows of the batch. "sequences" is
            the mean over heads and rows of each sequence, then over the sequences that have counted
            rows: a short sequence weighs as much as a long one, as in MiniLMv2's own code.
        backend: "auto" runs Triton on CUDA, PyTorch on the CPU and for fp64.

    Returns:
        `[pairs]` in fp32 (fp64 where a student is fp64): the mean over the counted rows that see at
        least one key (a sink is none), as `reduction` says. Gradients reach the student's queries,
        keys and sinks only. Without any such row the loss and its gradients are 0.

    Raises:
        ValueError: shapes, devices, modes that do not fit, sinks on one side of a pair, or a
            teacher that requires grad.
        TypeError: something that is no `AttentionState`, no float tensor or no bool mask.
    """
    masks = (key_mask, query_mask)
    options = (kind, temperature, causal, window, reduction, backend)
    seen = look_at_states(student, teacher, masks, "divergence", *options)
    look = None if seen is None else seen.look
    plan = plan_for(look, partial(checked_plan, student, teacher, masks, *options))
    columns = columns_of(student, teacher) if seen is None else seen.columns
    losses: Tensor = plan(columns, masks)
    return losses


def checked_plan(
    student: Sequence[AttentionState],
    teacher: Sequence[AttentionState],
    masks: Masks,
    kind: str,
    temperature: float,
    causal: bool,
    window: int | None,
    reduction: str,
    backend: str,
) -> Plan:
    """Losses `[pairs]` of columns and masks that look like those of this call, if all fits."""
    check_states(student, teacher)
    check_caps_and_sinks(student, teacher)
    batch, _, tokens, _ = student[0].query.shape
    device = student[0].query.device
    check_choice("kind", kind, get_args(AttentionDivergenceKind))
    check_choice("reduction", reduction, get_args(AttentionReduction))
    check_temperature(temperature)
    check_flag("causal", causal)
    _check_window(window)
    check_mask("key_mask", masks[0], batch, tokens, device)
    check_mask("query_mask", masks[1], batch, tokens, device)
    queries = [state.query for state in (*student, *teacher)]
    chosen = resolve_backend(backend, device, accumulator(*queries))
    keys = [
        (state_shapes(*pair), *((s.softcap is None, s.sinks is None) for s in pair))
        for pair in zip(student, teacher, strict=True)
    ]
    reach = min(window or 0, tokens)
    plan_of = partial(_plan, kind, temperature, causal, reach, reduction, chosen)
    plan = plan_by_shape(keys, plan_of, columns_of(student, teacher), masks)
    return losses_in(plan, student[0].query.dtype)


def _plan(
    kind: str,
    temperature: float,
    causal: bool,
    window: int,
    reduction: str,
    backend: str,
    columns: Columns,
    masks: Masks,
) -> Plan:
    """Losses `[pairs]` of columns and masks that look like these, of pairs of one shape."""
    query, teacher_query = columns.query[0], columns.teacher_query[0]
    batch, heads, tokens, dim = query.shape
    if backend == "triton":
        _check_head_size(max(dim, teacher_query.shape[-1]))
    dtype = accumulator(query, teacher_query)
    trained = [*columns.query, *columns.key, *columns.sinks]
    need_grad = torch.is_grad_enabled() and any(
        [tensor is not None and tensor.requires_grad for tensor in trained]
    )
    sides = ((columns.scale, columns.softcap), (columns.teacher_scale, columns.teacher_softcap))
    scales = [[one / temperature for one in scale] for scale, _ in sides]
    softcaps = [_softcaps(caps, temperature) for _, caps in sides]
    weights = partial(_item_weights, (batch, heads, tokens), reduction, dtype, query.device)

    def arguments(columns: Columns, masks: Masks) -> tuple[Any, ...]:
        row_mask = counted_rows(*masks, causal, window)
        return (
            columns.query,
            columns.key,
            columns.teacher_query,
            columns.teacher_key,
            *scales,
            masks[0],
            row_mask,
            weights(row_mask),
            kind,
            causal,
            window,
            *softcaps,
            _stacked_sinks(columns.sinks, dtype, temperature),
            _stacked_sinks(columns.teacher_sinks, dtype, temperature),
            need_grad,
            backend,
        )

    run = divergence.planned(arguments(columns, masks))
    return lambda columns, masks: run(arguments(columns, masks))[0]


def _softcaps(softcaps: Sequence[float | None], temperature: float) -> list[float] | None:
    """The caps of states that all have one, in the place where scores are divided already."""
    caps = [cap / temperature for cap in softcaps if cap is not None]
    return caps or None


def _stacked_sinks(
    sinks: Sequence[Tensor | None], dtype: torch.dtype, temperature: float
) -> Tensor | None:
    """Logits `[pairs, heads]` of states that all have sinks."""
    given = [one for one in sinks if one is not None]
    return torch.stack(given).to(dtype) / temperature if given else None


def _item_weights(
    shape: tuple[int, int, int],
    reduction: str,
    dtype: torch.dtype,
    device: torch.device,
    row_mask: Tensor | None,
) -> Tensor:
    """`[batch]`: what the loss takes of each item's sum over rows and heads; `shape` is batch,
    heads, tokens."""
    batch, heads, tokens = shape
    return remembered(
        (row_mask,),
        ("item weights", shape, reduction, dtype),
        device,
        lambda: (item_weights(row_mask, batch, tokens, reduction, device) / heads).to(dtype),
    )


def item_weights(
    row_mask: Tensor | None, batch: int, tokens: int, reduction: str, device: torch.device
) -> Tensor:
    """fp64 `[batch]`: what the loss takes of each item's sum over one head's rows."""
    if reduction == "tokens" or row_mask is None:
        # without a mask, sequences weigh alike
        count = batch * tokens if row_mask is None else row_mask.sum()
        return inverse(count, torch.float64, device).expand(batch)
    counts = row_mask.sum(1)
    return inverse(counts * (counts > 0).sum(), torch.float64, device)


def _weighed(sums: Tensor, weights: Tensor) -> Tensor:
    """Losses `[pairs]` from sums over rows `[pairs, batch]`, which rounding can leave below 0.

    In place.
    """
    return sums.mul_(weights).sum(1).relu_()


def _check_window(window: int | None) -> None:
    if window is None:
        return
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(
            f"window must be a number of tokens or None, got {type(window).__name__}; "
            "rows see the keys with |query - key| < window"
        )
    if window < 1:
        raise ValueError(f"window is {window}; expected 1 or more, or None for no window")


def _check_head_size(widest: int) -> None:
    if widest > MAX_HEAD_DIM:
        raise ValueError(
            f"head size {widest} is too wide for the Triton kernels, which take up to "
            f"{MAX_HEAD_DIM}; use backend='torch', or relation_divergence with more heads"
        )


def _pairs(lists: Sequence[Sequence[Any]], options: Sequence[Any]) -> list[Pair]:
    """Pairs from an op's lists, and from caps and sinks that may be None."""
    nothing = [None] * len(lists[0])
    return pairs_of(*lists, *(nothing if option is None else option for option in options))


# where the op's arguments stand; lists are heads and scales
HEADS, LISTS = slice(0, 4), slice(0, 6)
REST = slice(6, None)
MASKS, WEIGHTS, SINKS = slice(6, 8), 8, slice(14, 16)


@planned
def _divergence(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    scale: Sequence[float],
    teacher_scale: Sequence[float],
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    weights: Tensor,
    kind: str,
    causal: bool,
    window: int,
    student_softcap: Sequence[float] | None,
    teacher_softcap: Sequence[float] | None,
    student_sinks: Tensor | None,
    teacher_sinks: Tensor | None,
    need_grad: bool,
    backend: str,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Losses `[pairs]` and stacked gradients of the student's queries, keys and sinks.

    PyTorch's are unit gradients, Triton's those of the losses.
    """
    if backend == "torch":
        return _torch_divergence
    from . import triton_path

    pairs = _pairs(
        (query, key, teacher_query, teacher_key, scale, teacher_scale),
        (student_softcap, teacher_softcap, student_sinks, teacher_sinks),
    )
    masked = key_mask is not None or row_mask is not None
    plan = triton_path.forward(pairs, masked, kind, causal, window, need_grad)

    def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights = arguments[WEIGHTS]
        sums, *made = plan(arguments[HEADS], arguments[SINKS], arguments[MASKS], weights)
        return _weighed(sums, weights), made[0], made[1], made[2]

    return run


def _torch_divergence(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key_mask, row_mask, weights, kind, causal, window, *options, need_grad, _ = arguments[REST]
    sums, query, key, sinks = torch_path.forward(
        _pairs(arguments[LISTS], options), key_mask, row_mask, kind, causal, window, need_grad
    )
    return _weighed(sums, weights), query, key, sinks


def _fake(given: Named) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs, new, sinks = len(given.query), given.weights.new_empty, given.student_sinks
    if not given.need_grad:
        return new(pairs), new(0), new(0), new(0)
    if given.backend == "torch":
        query, key = (new((pairs, *of[0].shape)) for of in (given.query, given.key))
        # their sum over the batch waits for its items' weights
        of_sinks = new(0 if sinks is None else (pairs, *given.query[0].shape[:2]))
        return new(pairs), query, key, of_sinks
    dtype = waiting_dtype(given.query[0].dtype)
    query, key = (stacked_gradient(pairs, of[0], dtype) for of in (given.query, given.key))
    return new(pairs), query, key, new(0 if sinks is None else sinks.shape)


def _keep(given: Named, made: tuple[Tensor, ...]) -> dict[str, Any]:
    kept = {"query": made[1], "key": made[2], "dtype": given.query[0].dtype}
    kept["sinks"] = None if given.student_sinks is None else made[3]
    return kept | {"weights": given.weights if given.backend == "torch" else None}


def _gradient(kept: Named, upstream: Tensor) -> dict[str, Any]:
    """Gradients of queries, keys and, where there are some, sinks."""
    sinks = kept.sinks
    if kept.weights is None:
        query, key = rescaled(kept.query, kept.key, upstream, kept.dtype)
        sinks = None if sinks is None else sinks * upstream[:, None]
    else:
        factor = upstream[:, None] * kept.weights
        query, key = (scaled(unit, factor, kept.dtype) for unit in (kept.query, kept.key))
        sinks = None if sinks is None else scaled(sinks, factor, sinks.dtype).sum(1)
    return {"query": query, "key": key} | ({} if sinks is None else {"student_sinks": sinks})


divergence = register("attention_divergence", _divergence, _fake, _keep, _gradient)
