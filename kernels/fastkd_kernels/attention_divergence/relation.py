"""Divergence of self-attention relations: MiniLM (arXiv 2002.10957) and MiniLMv2 (2012.15828).

A relation is the attention of one of queries, keys, values over another. Heads are concatenated and
cut again into as many relation heads on both sides, so head counts and sizes may differ. All
arithmetic is that of `attention_divergence`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

from torch import Tensor

from ..checks import check_choice, check_frozen, check_pairs, check_tensor
from ..common.attention_columns import Columns, Masks, columns_of
from ..common.plan import Look, Plan, look_of_options, plan_for
from ..types import AttentionDivergenceKind, AttentionReduction, AttentionState, Backend, Relation
from .op import checked_plan

_FIELDS = {"q": "query", "k": "key", "v": "value"}
# of a pair of states, field by field
_SIDES = (slice(6), slice(6, 12))


def relation_divergence(
    student: Sequence[AttentionState],
    teacher: Sequence[AttentionState],
    *,
    relation: Relation = "vv",
    relation_heads: int,
    kind: AttentionDivergenceKind = "kl",
    temperature: float = 1.0,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    reduction: AttentionReduction = "tokens",
    backend: Backend = "auto",
) -> Tensor:
    """Mean divergence of the relations of each layer pair.

    A relation of X and Y is `softmax(X_r Y_r^T / sqrt(width / relation_heads) / temperature)` for
    each of `relation_heads` heads r, cut from the concatenated heads. "vv" is the value relation of
    MiniLM (arXiv 2002.10957, section 3.2); "qq", "kk" and "vv" are those of MiniLMv2 (arXiv
    2012.15828, section 3.1), which sums the losses of all three.

    Args:
        student: One `AttentionState` a pair. Heads and sizes of both sides may differ; their
            scales, soft caps and sinks are not read: a relation is of vectors, which no model caps.
        teacher: Likewise.
        relation: Which of queries, keys and values (X, Y). With GQA, "kk" and "vv" take the key
            heads as they are, and "qk" repeats every key head for the query heads that share it.
        relation_heads: Heads to cut both sides into; divides the width (heads times head size) of
            every tensor that the relation reads.
        kind: As this and all further arguments of `attention_divergence`.

    Returns:
        `[pairs]` in fp32 (fp64 where a student is fp64). Gradients reach the student's tensors that
        the relation reads.

    Raises:
        ValueError: a value that is missing, a width that does not divide, and all that
            `attention_divergence` refuses.
        TypeError: something that is no `AttentionState`, no float tensor or no bool mask.
    """
    masks = (key_mask, query_mask)
    options = (relation, relation_heads, kind, temperature, causal, window, reduction, backend)
    look = _look_at(student, teacher, masks, options)
    plan = plan_for(look, partial(_checked_plan, student, teacher, masks, *options))
    losses: Tensor = plan(columns_of(student, teacher), masks)
    return losses


def _look_at(
    student: object, teacher: object, masks: Masks, options: tuple[object, ...]
) -> Look | None:
    """None if the checks must see for themselves."""
    lists = (list, tuple)
    if type(student) not in lists or type(teacher) not in lists:
        return None
    sides: tuple[Any, Any] = (student, teacher)
    if not student or {*map(type, sides[0]), *map(type, sides[1])} != {AttentionState}:
        return None
    # what is not read too, so that letters need no checks; `values` may be None
    tensors = [tensor for side in sides for state in side for tensor in state[:3]]
    return look_of_options(("relation", len(sides[0]), len(sides[1]), *options), (*tensors, *masks))


def _checked_plan(
    student: Sequence[AttentionState],
    teacher: Sequence[AttentionState],
    masks: Masks,
    relation: Relation,
    relation_heads: int,
    *options: Any,
) -> Plan:
    """Losses `[pairs]` of columns and masks that look like those of this call, if all fits."""
    check_pairs(student, teacher)
    check_choice("relation", relation, get_args(Relation))
    if not isinstance(relation_heads, int) or isinstance(relation_heads, bool):
        raise TypeError(f"relation_heads must be an int, got {type(relation_heads).__name__}")
    if relation_heads < 1:
        raise ValueError(f"relation_heads is {relation_heads}; expected 1 or more")
    for pair, states in enumerate(zip(student, teacher, strict=True)):
        for name, state in zip(("student", "teacher"), states, strict=True):
            _check_relation(f"{name}[{pair}]", state, relation, relation_heads)
        for letter in relation:
            tensor = getattr(states[1], _FIELDS[letter])
            check_frozen(f"teacher[{pair}].{_FIELDS[letter]}", tensor)
    columns = _cut(columns_of(student, teacher), relation, relation_heads)
    pairs = [*zip(*columns, strict=True)]
    cut_student, cut_teacher = ([AttentionState(*pair[at]) for pair in pairs] for at in _SIDES)
    plan = checked_plan(cut_student, cut_teacher, masks, *options)
    return lambda columns, masks: plan(_cut(columns, relation, relation_heads), masks)


def _cut(columns: Columns, relation: str, heads: int) -> Columns:
    """Both tensors of the relation as `[batch, heads, tokens, width / heads]`, queries and keys."""
    nothing = [None] * len(columns.query)
    sides: list[Any] = []
    for prefix in ("", "teacher_"):
        left, right = (getattr(columns, prefix + _FIELDS[letter]) for letter in relation)
        queries = [_resplit(tensor, heads) for tensor in left]
        keys = queries
        if right is not left:
            matching = map(_repeated, right, left) if relation == "qk" else right
            keys = [_resplit(tensor, heads) for tensor in matching]
        scales = [tensor.shape[-1] ** -0.5 for tensor in queries]
        sides += [queries, keys, nothing, scales, nothing, nothing]
    return Columns(*sides)


def _check_relation(name: str, state: object, relation: str, heads: int) -> None:
    """Both tensors of the relation can be cut into so many heads."""
    if not isinstance(state, AttentionState):
        raise TypeError(f"{name} must be an AttentionState, got {type(state).__name__}")
    tensors = []
    for letter in relation:
        field = _FIELDS[letter]
        tensor = getattr(state, field)
        if field == "value" and tensor is None:
            raise ValueError(
                f"{name}.value is None and relation={relation!r} reads it; "
                "capture the values too, or use relation='qq', 'kk' or 'qk'"
            )
        check_tensor(f"{name}.{field}", tensor, "batch, heads, tokens, head_dim")
        tensors.append(tensor)
    left, right = tensors
    if relation == "qk" and left.shape[1] % right.shape[1]:
        raise ValueError(
            f"{name} has {left.shape[1]} query heads and {right.shape[1]} key heads; "
            "the key heads must divide the query heads"
        )
    for letter, tensor in zip(relation, tensors, strict=True):
        count = left.shape[1] if relation == "qk" else tensor.shape[1]
        width = count * tensor.shape[3]
        if width % heads:
            raise ValueError(
                f"{name}.{_FIELDS[letter]} is {width} wide ({count} heads of "
                f"{tensor.shape[3]}), which relation_heads={heads} does not divide; "
                "choose a divisor of the widths of both sides"
            )


def _repeated(key: Tensor, query: Tensor) -> Tensor:
    """Every key head once for each query head that shares it."""
    repeats = query.shape[1] // key.shape[1]
    return key if repeats == 1 else key.repeat_interleave(repeats, dim=1)


def _resplit(value: Tensor, heads: int) -> Tensor:
    """A view where the strides allow one, as in what models hand over."""
    batch, own_heads, tokens, _ = value.shape
    if own_heads == heads:
        return value
    return value.transpose(1, 2).reshape(batch, tokens, heads, -1).transpose(1, 2)
