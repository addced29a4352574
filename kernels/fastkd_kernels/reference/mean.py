"""The mean that definitions share."""

import torch
from torch import Tensor


def mean_square(difference: Tensor, count: Tensor | int) -> Tensor:
    """Sum of squares over `count` in at least fp32; 0 where nothing is counted."""
    dtype = torch.promote_types(difference.dtype, torch.float32)
    divisor = torch.as_tensor(count, device=difference.device).clamp(min=1).to(dtype)
    return difference.square().sum(dtype=dtype) / divisor
