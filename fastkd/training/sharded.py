"""How large parameters are, also where ZeRO-3 keeps a piece of each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, which is empty outside the forward where it is sharded."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole_numbers(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers parameters hold."""
    return sum(whole_shape(parameter).numel() for parameter in parameters)
