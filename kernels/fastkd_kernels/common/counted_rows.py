"""Which query rows count and see a key, from the masks of a call."""

import torch
from torch import Tensor

from .remembered import remembered


def counted_rows(
    key_mask: Tensor | None, query_mask: Tensor | None, causal: bool, window: int
) -> Tensor | None:
    """Query rows that count and see a key, bool `[batch, tokens]`; None is every row.

    `window` 0 is none. Found again as long as the masks are the same.
    """
    if key_mask is None:
        # every row sees itself
        return query_mask
    return remembered(
        (key_mask, query_mask),
        ("counted rows", causal, window),
        key_mask.device,
        lambda: _made(key_mask, query_mask, causal, window),
    )


def _made(key_mask: Tensor, query_mask: Tensor | None, causal: bool, window: int) -> Tensor:
    if not window:
        # of the keys up to a row, or of all
        seen = key_mask.cumsum(1) > 0 if causal else key_mask.any(1, keepdim=True)
        return seen.expand_as(key_mask) if query_mask is None else seen & query_mask
    tokens = key_mask.shape[1]
    position = torch.arange(tokens, device=key_mask.device)
    before = torch.nn.functional.pad(key_mask.long().cumsum(1), (1, 0))
    first = (position - window + 1).clamp(min=0)
    end = position + 1 if causal else (position + window).clamp(max=tokens)
    row_mask = before[:, end] > before[:, first]
    return row_mask if query_mask is None else row_mask & query_mask
