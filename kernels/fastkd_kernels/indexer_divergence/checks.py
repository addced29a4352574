"""Checks of indexers and the attention of their layers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..checks import (
    check_device,
    check_frozen,
    check_pairs,
    check_sinks,
    check_softcap,
    check_state,
    check_tensor,
)
from ..common.attention_columns import Masks
from ..common.plan import Look, look_of_options
from ..types import AttentionState, IndexerState


class Columns(NamedTuple):
    """The fields of indexers and of the states of their layers, each a list over pairs."""

    query: Sequence[Tensor]
    key: Sequence[Tensor]
    weights: Sequence[Tensor]
    teacher_query: Sequence[Tensor]
    teacher_key: Sequence[Tensor]
    teacher_value: Sequence[Tensor | None]
    teacher_scale: Sequence[float]
    teacher_softcap: Sequence[float | None]
    teacher_sinks: Sequence[Tensor | None]


class Seen(NamedTuple):
    """States of a call as lists over pairs, and the look by which its plan is found."""

    columns: Columns
    look: Look


def columns_of(student: Sequence[IndexerState], teacher: Sequence[AttentionState]) -> Columns:
    return Columns(*zip(*student, strict=True), *zip(*teacher, strict=True))


def look_at_indexers(
    student: object, teacher: object, masks: Masks, *options: object
) -> Seen | None:
    """None if the checks must see for themselves."""
    lists = (list, tuple)
    if type(student) not in lists or type(teacher) not in lists:
        return None
    sides: tuple[Any, Any] = (student, teacher)
    kinds = ({*map(type, sides[0])}, {*map(type, sides[1])})
    if kinds != ({IndexerState}, {AttentionState}):
        return None
    columns = columns_of(*sides)
    numbers = (*columns.teacher_scale, *columns.teacher_softcap)
    given = ("indexer", len(sides[0]), len(sides[1]), *numbers, *options)
    student_tensors = (*columns.query, *columns.key, *columns.weights)
    frozen = (*columns.teacher_query, *columns.teacher_key, *columns.teacher_sinks)
    look = look_of_options(given, (*student_tensors, *frozen, *masks))
    return None if look is None else Seen(columns, look)


def check_indexers(student: Sequence[IndexerState], teacher: Sequence[AttentionState]) -> None:
    """Every indexer fits the attention of its pair; all share batch, tokens and device."""
    check_pairs(student, teacher)
    for pair, (indexer, state) in enumerate(zip(student, teacher, strict=True)):
        names = (f"student[{pair}]", f"teacher[{pair}]")
        _check_indexer(names[0], indexer)
        check_state(names[1], state)
        check_softcap(f"{names[1]}.softcap", state.softcap)
        check_sinks(f"{names[1]}.sinks", state)
        for name, value in (
            *((f"{names[0]}.{field}", getattr(indexer, field)) for field in IndexerState._fields),
            (f"{names[1]}.query", state.query),
            (f"{names[1]}.key", state.key),
        ):
            check_device(name, value, student[0].query.device)
        for field, value in (("query", state.query), ("key", state.key), ("sinks", state.sinks)):
            if value is not None:
                check_frozen(f"{names[1]}.{field}", value)
        expected = (student[0].query.shape[0], student[0].query.shape[2])
        for name, query in ((names[0], indexer.query), (names[1], state.query)):
            given = (query.shape[0], query.shape[2])
            if given != expected:
                raise ValueError(
                    f"{name}.query has batch and tokens {given}; expected those of "
                    f"student[0], {expected}; run both models on the same batch"
                )


def _check_indexer(name: str, state: object) -> None:
    if not isinstance(state, IndexerState):
        raise TypeError(f"{name} must be an IndexerState, got {type(state).__name__}")
    check_tensor(f"{name}.query", state.query, "batch, index_heads, tokens, dim")
    four = isinstance(state.key, Tensor) and state.key.ndim == 4
    check_tensor(
        f"{name}.key", state.key, "batch, 1, tokens, dim" if four else "batch, tokens, dim"
    )
    check_tensor(f"{name}.weights", state.weights, "batch, tokens, index_heads")
    if state.query.dtype != state.key.dtype:
        raise TypeError(
            f"{name}.query is {state.query.dtype} and its key {state.key.dtype}; cast one of them"
        )
    batch, heads, tokens, dim = state.query.shape
    for field, value, shape in (
        ("key", state.key, (batch, 1, tokens, dim) if four else (batch, tokens, dim)),
        ("weights", state.weights, (batch, tokens, heads)),
    ):
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name}.{field} has shape {tuple(value.shape)}, which does not fit its query "
                f"{tuple(state.query.shape)}; expected {list(shape)}"
            )
