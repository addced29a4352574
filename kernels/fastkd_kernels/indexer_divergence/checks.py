"""Checks of indexers and the attention of their layers."""

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from ..checks import (
    check_device,
    check_frozen,
    check_pairs,
    check_sinks,
    check_softcap,
    check_state,
    check_tensor,
    has_passed,
    look_at,
    passes,
)
from ..types import AttentionState, IndexerState


def _look_at(student: object, teacher: object) -> Hashable | None:
    """What the checks of indexers read, of pairs that are alike."""
    if type(student) not in (list, tuple) or type(teacher) not in (list, tuple):
        return None
    sides: tuple[Any, Any] = (student, teacher)
    columns: list[list[object]] = [[], [], []]
    for state in sides[0]:
        if type(state) is not IndexerState:
            return None
        for column, tensor in zip(columns, state, strict=True):
            column.append(tensor)
    numbers: list[float | None] = []
    for state in sides[1]:
        if type(state) is not AttentionState or type(state.scale) is not float:
            return None
        if type(state.softcap) not in (float, type(None)):
            return None
        numbers += [state.scale, state.softcap]
    caps, sinks = numbers[1::2], [state.sinks for state in sides[1]]
    # some with and some without are not alike
    if any([0 < len([one for one in of if one is not None]) < len(of) for of in (caps, sinks)]):
        return None
    frozen = [[state.query for state in sides[1]], [state.key for state in sides[1]]]
    frozen.append([one for one in sinks if one is not None])
    if any([isinstance(one, Tensor) and one.requires_grad for column in frozen for one in column]):
        return None
    return look_at([*columns, *frozen], "indexers", *numbers)


def check_indexers(student: Sequence[IndexerState], teacher: Sequence[AttentionState]) -> bool:
    """Every indexer fits the attention of its pair; all share batch, tokens and device.

    Returns whether all pairs are known to share all shapes and dtypes.
    """
    look = _look_at(student, teacher)
    if has_passed(look):
        return True
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
    passes(look)
    return look is not None


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
