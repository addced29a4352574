"""One vector an example from the states of its tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "cls", "last"]


def pool_tokens(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """The mean of the tokens that are no padding, the first of them, or the last.

    Args:
        states: [batch, tokens, width].
        mask: bool [batch, tokens], `None` where nothing is padded; padding may be on either side.
        pooling: which.

    Returns:
        [batch, width], in fp32 or better.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if pooling == "mean":
        valid = mask.unsqueeze(-1).to(states.dtype)
        return (states * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    if pooling == "cls":
        chosen = places.masked_fill(~mask, mask.shape[1] - 1).min(dim=1).values
    else:
        chosen = places.masked_fill(~mask, 0).max(dim=1).values
    return states[torch.arange(len(states), device=states.device), chosen]
