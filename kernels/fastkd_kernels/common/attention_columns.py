"""What ops on attention heads take, as lists over pairs, and their masks side by side."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import AttentionState
from .remembered import remembered

# of keys and of query rows, bool `[batch, tokens]`
Masks = tuple[Tensor | None, Tensor | None]


class Columns(NamedTuple):
    """The fields of the states of both sides, each a list over pairs."""

    query: Sequence[Tensor]
    key: Sequence[Tensor]
    value: Sequence[Tensor | None]
    scale: Sequence[float]
    softcap: Sequence[float | None]
    sinks: Sequence[Tensor | None]
    teacher_query: Sequence[Tensor]
    teacher_key: Sequence[Tensor]
    teacher_value: Sequence[Tensor | None]
    teacher_scale: Sequence[float]
    teacher_softcap: Sequence[float | None]
    teacher_sinks: Sequence[Tensor | None]


def columns_of(student: Sequence[AttentionState], teacher: Sequence[AttentionState]) -> Columns:
    return Columns(*zip(*student, strict=True), *zip(*teacher, strict=True))


def stacked_masks(masks: Masks) -> Tensor:
    """uint8 `[2, batch, tokens]` of query rows and keys, from masks of which one is not None."""
    given = [mask for mask in masks if mask is not None]

    def stacked() -> Tensor:
        every = given[0] if len(given) == 2 else torch.ones_like(given[0])
        keys, rows = (every if mask is None else mask for mask in masks)
        # a copy in any case: what is remembered is no view of what it was made of
        return torch.stack((rows, keys)).view(torch.uint8)

    return remembered(masks, "stacked masks", given[0].device, stacked)


def masks_to_read(masks: Masks, device: torch.device) -> Tensor:
    """As `stacked_masks`; a placeholder where nothing is masked."""
    if masks[0] is None and masks[1] is None:
        return remembered(
            (), "no masks", device, lambda: torch.empty(0, dtype=torch.uint8, device=device)
        )
    return stacked_masks(masks)
