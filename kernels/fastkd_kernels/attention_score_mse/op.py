"""Mean squared error of attention scores (TinyBERT, arXiv 1909.10351, eq. 7) in linear memory.

Two algorithms, one op: "gram" gets loss and gradient from small Gram matrices in time linear in the
tokens; "tiles" forms the difference of scores in blocks and is better for short sequences. The
road not taken: one autograd graph of matmuls, which would keep `[tokens, tokens]` maps alive.

The registered op "one_pass" makes unit gradients in the forward. "gram", on Triton alone, keeps
small factors for a backward of its own. Both take lists over layer pairs of one shape.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, get_args

import torch
from torch import Tensor

from ..checks import (
    check_choice,
    check_flag,
    check_mask,
    check_reduction,
    look_at_states,
    resolve_backend,
)
from ..common.attention_columns import Columns, Masks, columns_of, stacked_masks
from ..common.autograd import Named, accumulator, inverse, planned, register, scaled, value_of
from ..common.head_groups import pairs_of, state_shapes
from ..common.plan import Plan, losses_in, plan_by_shape, plan_for
from ..common.remembered import remembered
from ..common.rescale import rescaled, stacked_gradient
from ..types import (
    Algorithm,
    AttentionState,
    Backend,
    Reduction,
    TeacherLayers,
    TeacherWeights,
)
from . import torch_path
from .weighted_teacher import weighted_teachers

# the widest student head whose gradient the tile kernels hold
MAX_HEAD_DIM = 256

# (backend, causal): from this many tokens per column of student plus teacher on, "gram" is the
# faster one. Measured, for "triton" in bf16 on an H100.
GRAM_TOKENS_PER_COLUMN = {
    ("torch", False): 1.1,
    ("torch", True): 4.0,
    ("triton", False): 6.0,
    ("triton", True): 12.0,
}


def choose_algorithm(
    tokens: int, student_dim: int, teacher_dim: int, *, causal: bool, backend: str
) -> str:
    """ "tiles" or "gram" for one shape; `backend` is "torch" or "triton"."""
    if backend == "triton" and not causal and student_dim > MAX_HEAD_DIM:
        return "gram"
    per_column = GRAM_TOKENS_PER_COLUMN[backend, causal]
    return "gram" if tokens >= per_column * (student_dim + teacher_dim) else "tiles"


def attention_score_mse(
    student: Sequence[AttentionState],
    teacher: Sequence[TeacherLayers],
    *,
    teacher_weights: TeacherWeights | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    reduction: Reduction = "valid",
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
) -> Tensor:
    """Mean squared difference of the attention scores of each layer pair (arXiv 1909.10351, eq. 7).

    Args:
        student, teacher: One `AttentionState` a pair, on one device. Queries are
            `[batch, heads, tokens, head_dim]` and keys `[batch, kv_heads, tokens, head_dim]` in
            bf16, fp16, fp32 or fp64, with any strides. Head counts of a pair agree; head sizes,
            key heads and dtypes may differ. Values are not read, nor soft caps and sinks: scores
            are compared as they are before a cap, and a sink is no score. A teacher entry may be a
            list of states, which share dtype and key heads: the target is the weighted sum of their
            scores.
        teacher_weights: For each pair the weights of its teacher layers, or None for an even
            average: numbers, the largest of which is in size from 1e-20 to 1e20 together with the
            layer's scale. None is an even average everywhere.
        key_mask: Bool `[batch, tokens]`, True at valid keys; None counts every key.
        query_mask: Bool `[batch, tokens]`, True at valid query rows; None counts every row, also
            where `key_mask` is given. Not read by "tinybert".
        causal: Count keys at or before the query only.
        reduction: "valid" divides by the valid (query, key) pairs times heads. "tinybert" is the
            loss of the official code: masked keys are zero on both sides, padded query rows count,
            and the divisor is `batch * heads * tokens**2`. The official code also zeroes raw
            scores at or below -100, which trained models do not reach; this op keeps those.
        backend: "auto" runs Triton on CUDA, PyTorch on the CPU and for fp64.
        algorithm: "auto" takes what `choose_algorithm` says.

    Returns:
        `[pairs]` in fp32 (fp64 where a student is fp64). Gradients reach the student's queries and
        keys only. Without any valid entry the loss and its gradients are 0.
        Tensors of inference mode may be read by the backward too, which can't tell whether they
        were written to meanwhile: leave them as they are until then.

    Raises:
        ValueError: shapes, devices, modes that do not fit, or a teacher that requires grad.
        TypeError: something that is no `AttentionState`, no float tensor or no bool mask.
    """
    masks, seen = (key_mask, query_mask), None
    options = (causal, reduction, backend, algorithm)
    if teacher_weights is None:
        seen = look_at_states(student, teacher, masks, "score", *options)
    if seen is None:
        teachers = weighted_teachers(student, teacher, teacher_weights)
        columns = columns_of(student, teachers)
        plan = _checked_plan(student, teachers, masks, *options)
    else:

        def made() -> Plan:
            teachers = weighted_teachers(student, teacher, None)
            return _checked_plan(student, teachers, masks, *options)

        columns, plan = seen.columns, plan_for(seen.look, made)
    losses: Tensor = plan(columns, masks)
    return losses


def _checked_plan(
    student: Sequence[AttentionState],
    teachers: Sequence[AttentionState],
    masks: Masks,
    causal: bool,
    reduction: str,
    backend: str,
    algorithm: str,
) -> Plan:
    """Losses `[pairs]` of columns and masks that look like those of checked states, if all fits."""
    batch, _, tokens, _ = student[0].query.shape
    device = student[0].query.device
    check_mask("key_mask", masks[0], batch, tokens, device)
    check_mask("query_mask", masks[1], batch, tokens, device)
    check_flag("causal", causal)
    check_reduction(reduction)
    check_choice("algorithm", algorithm, get_args(Algorithm))
    queries = [state.query for state in (*student, *teachers)]
    chosen = resolve_backend(backend, device, accumulator(*queries))
    keys = [state_shapes(*pair) for pair in zip(student, teachers, strict=True)]
    plan_of = partial(_plan, causal, reduction, chosen, algorithm)
    plan = plan_by_shape(keys, plan_of, columns_of(student, teachers), masks)
    return losses_in(plan, student[0].query.dtype)


def _plan(
    causal: bool,
    reduction: str,
    backend: str,
    algorithm: str,
    columns: Columns,
    masks: Masks,
) -> Plan:
    """Losses `[pairs]` of columns and masks that look like these, of pairs of one shape."""
    query, key, teacher_query = columns.query, columns.key, columns.teacher_query
    batch, heads, tokens, dim = query[0].shape
    dims = (dim, teacher_query[0].shape[-1])
    if algorithm == "auto":
        algorithm = choose_algorithm(tokens, *dims, causal=causal, backend=backend)
    if backend == "triton":
        _check_head_size(algorithm, causal, dim)
    total = accumulator(query[0], teacher_query[0])
    count = partial(
        _inverse_count, (batch, heads, tokens), causal, reduction, total, query[0].device
    )
    need_grad = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (*query, *key)])
    scales = ([*map(float, columns.scale)], [*map(float, columns.teacher_scale)])
    by_gram = algorithm == "gram" and not causal and backend == "triton"
    op = gram if by_gram else one_pass
    rest = (need_grad,) if by_gram else (causal, algorithm, need_grad, backend)

    def arguments(columns: Columns, masks: Masks) -> tuple[Any, ...]:
        key_mask, query_mask = masks
        if reduction == "tinybert":
            query_mask = None
        heads = (columns.query, columns.key, columns.teacher_query, columns.teacher_key)
        return *heads, *scales, key_mask, query_mask, count(key_mask, query_mask), *rest

    run = op.planned(arguments(columns, masks))
    return lambda columns, masks: run(arguments(columns, masks))[0]


def _check_head_size(algorithm: str, causal: bool, dim: int) -> None:
    """Every causal algorithm has tiles, which keep the gradient of a student head in registers."""
    if dim <= MAX_HEAD_DIM or (algorithm == "gram" and not causal):
        return
    instead = "backend='torch'" if causal else "algorithm='gram' or backend='torch'"
    raise ValueError(
        f"the student's head size {dim} is too wide for the Triton tiles, which take up to "
        f"{MAX_HEAD_DIM}; use {instead}"
    )


def _inverse_count(
    shape: tuple[int, int, int],
    causal: bool,
    reduction: str,
    dtype: torch.dtype,
    device: torch.device,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> Tensor:
    """One over the entries that the loss averages over, of `shape`: batch, heads, tokens."""
    sources = (key_mask, query_mask) if reduction == "valid" else (None, None)
    return remembered(
        sources,
        ("inverse entries", shape, causal, reduction, dtype),
        device,
        lambda: inverse(
            _entry_count(shape, key_mask, query_mask, causal, reduction), dtype, device
        ),
    )


def _entry_count(
    shape: tuple[int, int, int],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    causal: bool,
    reduction: str,
) -> Tensor | int:
    """Entries that the loss averages over: batch, heads, query rows and keys."""
    batch, heads, tokens = shape
    if reduction == "tinybert":
        return batch * heads * tokens * tokens
    if key_mask is None and query_mask is None:
        return batch * heads * (tokens * (tokens + 1) // 2 if causal else tokens * tokens)
    valid = stacked_masks((key_mask, query_mask))
    # of each item's rows, keys up to its own, or all of them
    entries = valid[0] * valid[1].cumsum(1) if causal else valid.sum(2).prod(0)
    return heads * entries.sum()


@cache
def _path(backend: str) -> Any:
    """The module that computes; Triton is imported by the first call that needs it."""
    if backend == "torch":
        return torch_path
    from . import triton_path

    return triton_path


# where arguments of both forwards stand; lists are heads and scales
HEADS, LISTS = slice(0, 4), slice(0, 6)
REST = slice(6, None)
MASKS, INVERSE_COUNT = slice(6, 8), 8


@planned
def _gram(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    scale: Sequence[float],
    teacher_scale: Sequence[float],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    inverse_count: Tensor,
    need_grad: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Losses `[pairs]` and the factors that the backward applies (see `gram.py`)."""
    pairs = pairs_of(query, key, teacher_query, teacher_key, scale, teacher_scale)
    masked = key_mask is not None or query_mask is not None
    plan = _path("triton").gram_forward(pairs, masked, need_grad)

    def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        squares, to_query, to_key = plan(arguments[HEADS], arguments[MASKS])
        return value_of(squares, arguments[INVERSE_COUNT]), to_query, to_key

    return run


def _gram_fake(given: Named) -> tuple[Tensor, Tensor, Tensor]:
    query, key, new = given.query, given.key, given.inverse_count.new_empty
    batch, _, _, dim = query[0].shape
    groups = math.lcm(key[0].shape[1], given.teacher_key[0].shape[1])
    shape = (len(query), batch, groups, dim + given.teacher_query[0].shape[-1], dim)
    made = shape if given.need_grad else (0,)
    return new(len(query)), new(made), new(made)


# where arguments of the backward stand
BACKWARD_FACTORS = slice(0, 3)
BACKWARD_HEADS, BACKWARD_MASKS = slice(3, 7), slice(9, 11)


@planned
def _gram_backward(
    factor: Tensor,
    to_query: Tensor,
    to_key: Tensor,
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    scale: Sequence[float],
    teacher_scale: Sequence[float],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Stacked gradients of the student's queries and keys for `factor` `[pairs]`."""
    pairs = pairs_of(query, key, teacher_query, teacher_key, scale, teacher_scale)
    masked = key_mask is not None or query_mask is not None
    plan = _path("triton").gram_backward(pairs, masked)

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        heads, masks = arguments[BACKWARD_HEADS], arguments[BACKWARD_MASKS]
        made: tuple[Tensor, Tensor] = plan(*arguments[BACKWARD_FACTORS], heads, masks)
        return made

    return run


def _gram_backward_fake(given: Named) -> tuple[Tensor, Tensor]:
    pairs = len(given.query)
    query, key = (stacked_gradient(pairs, of[0], of[0].dtype) for of in (given.query, given.key))
    return query, key


_registered_gram_backward = register(
    "attention_score_mse_gram_backward", _gram_backward, _gram_backward_fake
)


def _gram_keep(given: Named, made: tuple[Tensor, ...]) -> dict[str, Any]:
    inputs = {word: value for word, value in vars(given).items() if word != "need_grad"}
    return {"to_query": made[1], "to_key": made[2], **inputs}


def _gram_gradient(kept: Named, upstream: Tensor) -> dict[str, Any]:
    inputs = vars(kept)
    inverse_count = inputs.pop("inverse_count")
    query, key = _registered_gram_backward(2.0 * inverse_count * upstream, **inputs)
    return {"query": query, "key": key}


gram = register("attention_score_mse_gram", _gram, _gram_fake, _gram_keep, _gram_gradient)


@planned
def _one_pass(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    scale: Sequence[float],
    teacher_scale: Sequence[float],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    inverse_count: Tensor,
    causal: bool,
    algorithm: str,
    need_grad: bool,
    backend: str,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Losses `[pairs]` and stacked gradients of the student's queries and keys.

    PyTorch's are unit gradients, Triton's those of the losses.
    """
    pairs = pairs_of(query, key, teacher_query, teacher_key, scale, teacher_scale)
    if backend == "torch":
        return _torch_one_pass
    masked = key_mask is not None or query_mask is not None
    plan = _path(backend).one_pass(pairs, masked, causal, algorithm, need_grad)

    def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        inverse_count = arguments[INVERSE_COUNT]
        squares, of_query, of_key = plan(
            arguments[HEADS], arguments[MASKS], inverse_count + inverse_count
        )
        return value_of(squares, inverse_count), of_query, of_key

    return run


def _torch_one_pass(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    key_mask, query_mask, inverse_count, causal, algorithm, need_grad, _ = arguments[REST]
    squares, query, key = torch_path.one_pass(
        pairs_of(*arguments[LISTS]), key_mask, query_mask, causal, algorithm, need_grad
    )
    return value_of(squares, inverse_count), query, key


def _one_pass_fake(given: Named) -> tuple[Tensor, Tensor, Tensor]:
    pairs, new = len(given.query), given.inverse_count.new_empty
    if not given.need_grad:
        return new(pairs), new(0), new(0)
    if given.backend == "torch":
        query, key = (new((pairs, *of[0].shape)) for of in (given.query, given.key))
        return new(pairs), query, key
    from .triton_path import gradient_dtype

    dtype = gradient_dtype(given.query[0].dtype, given.algorithm)
    query, key = (stacked_gradient(pairs, of[0], dtype) for of in (given.query, given.key))
    return new(pairs), query, key


def _one_pass_keep(given: Named, made: tuple[Tensor, ...]) -> dict[str, Any]:
    kept = {"query": made[1], "key": made[2], "dtype": given.query[0].dtype}
    return kept | {"inverse_count": given.inverse_count if given.backend == "torch" else None}


def _one_pass_gradient(kept: Named, upstream: Tensor) -> dict[str, Any]:
    if kept.inverse_count is None:
        query, key = rescaled(kept.query, kept.key, upstream, kept.dtype)
    else:
        factor = 2.0 * kept.inverse_count * upstream
        query, key = (scaled(unit, factor, kept.dtype) for unit in (kept.query, kept.key))
    return {"query": query, "key": key}


one_pass = register(
    "attention_score_mse_one_pass", _one_pass, _one_pass_fake, _one_pass_keep, _one_pass_gradient
)
