"""What the tests of soft caps and attention sinks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from conditioning import OFTEN, Change, Define
from divergence_cases import moved
from fastkd_kernels import AttentionState, attention_divergence, reference
from kernel_cases import attention_states, errors, loss_and_gradients, near
from torch import Tensor

States = tuple[list[AttentionState], list[AttentionState]]
# soft caps of student and teacher, and whether there are sinks
FORMS: dict[str, tuple[tuple[float | None, float | None], bool]] = {
    "student capped": ((0.8, None), False),
    "teacher capped": ((None, 1.2), False),
    "sinks": ((None, None), True),
    "caps and sinks": ((0.8, 1.5), True),
}


def formed(states: Any, form: str, seed: int = 4) -> States:
    """The states with the caps of a form, another in every pair, and its sinks."""
    caps, has_sinks = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for side, cap in zip(states, caps, strict=True):
        made = []
        for index, state in enumerate(side):
            drawn = torch.randn(state.query.shape[1], generator=generator).to(state.query)
            softcap = None if cap is None else cap * (1 + index)
            made.append(state._replace(softcap=softcap, sinks=drawn if has_sinks else None))
        sides.append(made)
    return trained(sides[0]), sides[1]


def trained(states: Sequence[AttentionState]) -> list[AttentionState]:
    """The same values as leaves that require grad, the sinks among them."""
    return [_mapped(state, lambda tensor: tensor.detach().requires_grad_()) for state in states]


def cast(states: Sequence[AttentionState], dtype: torch.dtype) -> list[AttentionState]:
    return [_mapped(state, lambda tensor: tensor.detach().to(dtype)) for state in states]


def _mapped(state: AttentionState, change: Any) -> AttentionState:
    made = state._replace(query=change(state.query), key=change(state.key))
    return made if state.sinks is None else made._replace(sinks=change(state.sinks))


def leaves_of(states: Sequence[AttentionState]) -> list[Tensor]:
    """Queries and keys of every state, and its sinks where it has some."""
    return [
        tensor
        for state in states
        for tensor in (state.query, state.key, state.sinks)
        if tensor is not None
    ]


def op_of(states: Any, **options: Any) -> list[Tensor]:
    """Losses and gradients of the op."""
    return loss_and_gradients(attention_divergence, leaves_of(states[0]), *states, **options)


def defined(states: Any, **options: Any) -> list[Tensor]:
    """Losses and gradients of the definition, in the states' own precision."""
    options = {name: value for name, value in options.items() if name != "backend"}
    leaves = leaves_of(states[0])
    return loss_and_gradients(reference.attention_divergence, leaves, *states, **options)


def exact(states: Any, **options: Any) -> list[Tensor]:
    """Losses and gradients of the definition on fp64 copies."""
    student, teacher = states
    copies = trained(cast(student, torch.float64)), cast(teacher, torch.float64)
    return defined(copies, **options)


def exactly_defined(states: Any, **options: Any) -> Define:
    """The definition on what the states' tensors become by a change."""

    def define(change: Change) -> list[Tensor]:
        student, teacher = ([_mapped(state, change) for state in side] for side in states)
        return defined((trained(student), teacher), **options)

    return define


def no_worse(
    given: Sequence[Tensor],
    expected: Sequence[Tensor],
    plain: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    sinks: bool,
) -> None:
    """At most twice the error of plain PyTorch, or some roundings of the result.

    The sinks of all pairs are judged together and at four times: each gradient is a single number a
    head, in which the roundings of many rows cancel, more or less by chance.
    """
    few = 8 * torch.finfo(torch.float32).eps
    floors = [few, *[torch.finfo(dtype).eps] * (len(given) - 1)]
    often = [OFTEN] * len(floors)
    sides = [list(side) for side in (given, expected, plain)]
    if sinks:
        sides = [_sinks_joined(side) for side in sides]
        floors = [*floors[: len(sides[0]) - 1], max(few, floors[-1])]
        often = [*[OFTEN] * (len(sides[0]) - 1), 2.0 * OFTEN]
    own, theirs = errors(sides[0], sides[1]), errors(sides[2], sides[1])
    bounds = [max(n * b, floor) for n, b, floor in zip(often, theirs, floors, strict=True)]
    assert all(a <= b for a, b in zip(own, bounds, strict=True)), (own, bounds)


def _sinks_joined(values: list[Tensor]) -> list[Tensor]:
    """The loss, gradients of queries and keys, and one tensor of all sinks' gradients."""
    grads = values[1:]
    others = [grad for index, grad in enumerate(grads) if index % 3 < 2]
    return [values[0], *others, torch.cat(grads[2::3])]


def near_states(
    distance: float,
    dtype: torch.dtype,
    form: str,
    *,
    tokens: int,
    heads: int = 2,
    cap: float | None = None,
    device: str = "cpu",
) -> States:
    """Students at a relative distance of their teachers, sinks too; `cap` in place of the form's
    caps, so that both sides have one."""
    teacher = formed(([], attention_states(4, 1, heads, tokens, (16, 16))[1]), form)[1]
    if cap is not None:
        teacher = [state._replace(softcap=cap) for state in teacher]
    generator = torch.Generator().manual_seed(8)
    student = near(teacher, distance)
    if FORMS[form][1]:
        student = [
            s._replace(sinks=s.sinks + distance * torch.randn(heads, generator=generator).double())
            for s in student
            if s.sinks is not None
        ]
    sides = [on_device(cast(side, dtype), device) for side in (student, teacher)]
    return trained(sides[0]), sides[1]


def on_device(states: Sequence[AttentionState], device: str) -> list[AttentionState]:
    return [
        state if state.sinks is None else state._replace(sinks=state.sinks.to(device))
        for state in moved(states, device)
    ]
