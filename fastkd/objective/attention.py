"""The term that compares attention."""

from __future__ import annotations

from fastkd_kernels import attention_score_mse
from torch import Tensor, nn

from fastkd.capture import Capture
from fastkd.objective.divisors import Reduction

Layers = tuple[tuple[int, int], ...]


class AttentionTerm(nn.Module):
    """Score MSE of all mapped blocks in one call."""

    def __init__(self, pairs: Layers, reduction: Reduction, causal: bool) -> None:
        super().__init__()
        self.pairs = pairs
        self.reduction = reduction
        self.causal = causal

    def forward(self, student: Capture, teacher: Capture, mask: Tensor | None) -> Tensor:
        """Losses [pairs], fp32."""
        return attention_score_mse(
            [student.attention[s] for s, _ in self.pairs],
            [teacher.attention[t] for _, t in self.pairs],
            key_mask=mask,
            query_mask=mask if self.reduction == "valid" else None,
            causal=self.causal,
            reduction=self.reduction,
        )
