"""What the tests of attention_divergence and relation_divergence share."""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from conditioning import Define
from fastkd_kernels import AttentionDivergenceKind, AttentionState, attention_divergence, reference
from kernel_cases import (
    attention_states,
    cast,
    defined_states,
    leaves_of,
    loss_and_gradients,
    near,
    trained,
)
from torch import Tensor

KINDS = get_args(AttentionDivergenceKind)

States = tuple[list[AttentionState], list[AttentionState]]


def divergence_both(states: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradients of the op and of its definition on fp64 copies."""
    student, teacher = states
    exact = trained(cast(student, torch.float64)), cast(teacher, torch.float64)
    given = loss_and_gradients(attention_divergence, leaves_of(student), *states, **options)
    return given, defined(exact, **options)


def defined(states: Any, **options: Any) -> list[Tensor]:
    """Losses and gradients of the definition."""
    options = {name: value for name, value in options.items() if name != "backend"}
    return loss_and_gradients(
        reference.attention_divergence, leaves_of(states[0]), *states, **options
    )


def exactly_defined(states: Any, **options: Any) -> Define:
    """The definition on what the states' tensors become by a change."""
    return defined_states(reference.attention_divergence, states, **options)


def holes(batch: int, tokens: int) -> Tensor:
    """A mask with gaps, so that a narrow window leaves rows that see nothing."""
    position = torch.arange(tokens)[None, :] + 5 * torch.arange(batch)[:, None]
    return position % 16 < 9


def near_states(
    distance: float, dtype: torch.dtype, *, heads: int, tokens: int, dim: int, device: str = "cpu"
) -> States:
    """Students at a relative distance of their teachers, in `dtype`; four pairs, so that the errors
    of the losses are no single draw."""
    teacher = attention_states(4, 1, heads, tokens, (dim, dim))[1]
    student = cast(near(teacher, distance), dtype)
    return trained(moved(student, device)), moved(cast(teacher, dtype), device)


def moved(states: Sequence[AttentionState], device: str) -> list[AttentionState]:
    return [s._replace(query=s.query.to(device), key=s.key.to(device)) for s in states]
