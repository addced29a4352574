"""Divergence of self-attention relations: MiniLM (arXiv 2002.10957) and MiniLMv2 (2012.15828).

A relation is the attention of one of queries, keys, values over another. Heads are concatenated and
cut again into as many relation heads on both sides, so head counts and sizes may differ. All
arithmetic is that of `attention_divergence`.
"""

from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from ..checks import check_choice, check_frozen, check_pairs, check_tensor
from ..types import AttentionDivergenceKind, AttentionReduction, AttentionState, Backend, Relation
from .op import attention_divergence

_FIELDS = {"q": "query", "k": "key", "v": "value"}


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
        student, teacher: One `AttentionState` a pair. Heads and sizes of both sides may differ;
            their scales, soft caps and sinks are not read: a relation is of vectors, which no model
            caps.
        relation: Which of queries, keys and values (X, Y). With GQA, "kk" and "vv" take the key
            heads as they are, and "qk" repeats every key head for the query heads that share it.
        relation_heads: Heads to cut both sides into; divides the width (heads times head size) of
            every tensor that the relation reads.
        kind, temperature, key_mask, query_mask, causal, window, reduction, backend: As in
            `attention_divergence`.

    Returns:
        `[pairs]` in fp32 (fp64 where a student is fp64). Gradients reach the student's tensors that
        the relation reads.

    Raises:
        ValueError: a value that is missing, a width that does not divide, and all that
            `attention_divergence` refuses.
        TypeError: something that is no `AttentionState`, no float tensor or no bool mask.
    """
    check_pairs(student, teacher)
    check_choice("relation", relation, get_args(Relation))
    if not isinstance(relation_heads, int) or isinstance(relation_heads, bool):
        raise TypeError(f"relation_heads must be an int, got {type(relation_heads).__name__}")
    if relation_heads < 1:
        raise ValueError(f"relation_heads is {relation_heads}; expected 1 or more")
    student_states = [
        _relation(f"student[{pair}]", state, relation, relation_heads)
        for pair, state in enumerate(student)
    ]
    teacher_states = []
    for pair, state in enumerate(teacher):
        teacher_states.append(_relation(f"teacher[{pair}]", state, relation, relation_heads))
        for letter in relation:
            check_frozen(f"teacher[{pair}].{_FIELDS[letter]}", getattr(state, _FIELDS[letter]))
    return attention_divergence(
        student_states,
        teacher_states,
        kind=kind,
        temperature=temperature,
        key_mask=key_mask,
        query_mask=query_mask,
        causal=causal,
        window=window,
        reduction=reduction,
        backend=backend,
    )


def _relation(name: str, state: object, relation: str, heads: int) -> AttentionState:
    """Both tensors of the relation as `[batch, relation_heads, tokens, width / relation_heads]`."""
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
    if relation == "qk" and left.shape[1] != right.shape[1]:
        if left.shape[1] % right.shape[1]:
            raise ValueError(
                f"{name} has {left.shape[1]} query heads and {right.shape[1]} key heads; "
                "the key heads must divide the query heads"
            )
        right = right.repeat_interleave(left.shape[1] // right.shape[1], dim=1)
    for letter, tensor in zip(relation, (left, right), strict=True):
        width = tensor.shape[1] * tensor.shape[3]
        if width % heads:
            raise ValueError(
                f"{name}.{_FIELDS[letter]} is {width} wide ({tensor.shape[1]} heads of "
                f"{tensor.shape[3]}), which relation_heads={heads} does not divide; "
                "choose a divisor of the widths of both sides"
            )
    left_heads = _resplit(left, heads)
    right_heads = left_heads if right is left else _resplit(right, heads)
    return AttentionState(left_heads, right_heads, None, left_heads.shape[-1] ** -0.5)


def _resplit(value: Tensor, heads: int) -> Tensor:
    """A view where the strides allow one, as in what models hand over."""
    batch, own_heads, tokens, _ = value.shape
    if own_heads == heads:
        return value
    return value.transpose(1, 2).reshape(batch, tokens, heads, -1).transpose(1, 2)
