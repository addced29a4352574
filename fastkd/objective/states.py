"""The term that compares hidden states and embeddings, and its projections."""

from __future__ import annotations

from fastkd_kernels import hidden_mse
from torch import Tensor, nn

from fastkd.capture import Capture
from fastkd.objective.attention import Layers
from fastkd.objective.divisors import Reduction


class StateTerm(nn.Module):
    """MSE of hidden states and embeddings of all mapped layers in one call.

    The projections are parameters of this module itself, so that ZeRO-3 gathers them for its
    `forward`: `weight_0`, or `weight_0`, `weight_1`, ... with one a pair; [teacher, student] width.
    """

    def __init__(
        self,
        pairs: Layers,
        projections: int,
        widths: tuple[int, int],
        bias: bool,
        reduction: Reduction,
    ) -> None:
        """Make the projections.

        Args:
            pairs: (student layer, teacher layer).
            projections: 0 for identity, 1 for a shared one, or as many as pairs.
            widths: of student and teacher.
            bias: whether the projections have one.
            reduction: what the mean is over.
        """
        super().__init__()
        self.pairs = pairs
        self.projections = projections
        self.bias = bias and projections > 0
        self.reduction = reduction
        for index in range(projections):
            linear = nn.Linear(*widths, bias=bias)
            for kind, parameter in linear.named_parameters():
                self.register_parameter(f"{kind}_{index}", parameter)

    def forward(self, student: Capture, teacher: Capture, mask: Tensor | None) -> Tensor:
        """Losses [pairs], fp32."""
        return hidden_mse(
            [student.hidden[s] for s, _ in self.pairs],
            [teacher.hidden[t] for _, t in self.pairs],
            weight=self._parameters_of("weight"),
            bias=self._parameters_of("bias") if self.bias else None,
            mask=mask,
            reduction=self.reduction,
        )

    def _parameters_of(self, kind: str) -> Tensor | list[Tensor] | None:
        found: list[Tensor] = [
            self.get_parameter(f"{kind}_{index}") for index in range(self.projections)
        ]
        return found[0] if len(found) == 1 else found or None
