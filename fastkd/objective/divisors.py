"""What the losses of a step are means over, counted so that cutting a step changes nothing.

A loss here is a mean over valid query-key pairs or over valid tokens of the *whole* optimiser step.
One micro-batch of one rank holds a part of those, so its means are scaled by that part: the sum
over micro-batches and ranks is then the same however the step is cut, and padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Reduction = Literal["valid", "tinybert"]


def count_divisors(inputs: Inputs, causal: bool, reduction: Reduction) -> Tensor:
    """What a micro-batch contributes to the two divisors of a step.

    Args:
        inputs: `input_ids` [batch, tokens] and, if padded, `attention_mask` of the same shape.
        causal: whether queries see earlier keys only.
        reduction: whether padding counts.

    Returns:
        fp64 [2] on the inputs' device: query-key pairs and tokens.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask") if reduction == "valid" else None
    valid = torch.ones_like(ids, dtype=torch.float64) if mask is None else mask.to(torch.float64)
    visible = causal and reduction == "valid"
    keys = valid.cumsum(dim=1) if visible else valid.sum(dim=1, keepdim=True)
    return torch.stack([(valid * keys).sum(), valid.sum()])
