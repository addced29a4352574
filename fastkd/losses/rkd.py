"""`losses.rkd`: how the sentences of a micro-batch lie to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pdist, smooth_l1_loss

from fastkd.losses.base import Batch, Captures, Loss, LossConfig
from fastkd.losses.gathering import gathered_value
from fastkd.losses.pooling import Pooling, pool_tokens
from fastkd.losses.registry import register_loss
from fastkd.types import Head

if TYPE_CHECKING:
    from fastkd.capture import Capture


@register_loss("rkd")
class RelationalLoss(Loss):
    """Distances or angles among pooled embeddings (RKD, Park et al., arXiv 1904.05068, eq. 5 to 8).

    With points x of the sequences, pooled, and a Huber loss of each relation:

        distance  |x_i - x_j| over the mean of all pairs
        angle     cos of the angle at x_j between x_i and x_k

    Widths may differ, as each model is compared with itself. All sentences of an optimiser step
    meet, see `Batch.gather`; in an evaluation as many. Fewer than two sentences
    (three for angles) have nothing to compare and give zero, as does an angle at a point that
    coincides, up to rounding, with one of the others.
    """

    class Config(LossConfig):
        """Distances or angles among the sentences of a step."""

        kind: Literal["distance", "angle"] = "distance"
        """Distances of all pairs over their mean, or cosines of the angles of all triplets; both
        under a Huber loss."""
        pooling: Pooling = "mean"
        """The mean of the tokens that are no padding, the first of them, or the last."""

    config: Config
    captures = Captures(outputs=True)

    @property
    def least_rows(self) -> int:  # type: ignore[override]
        return 2 if self.config.kind == "distance" else 3

    @classmethod
    def compares_tokens(cls, head: Head) -> bool:
        """No: it pools them."""
        return False

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """A scalar, fp32."""
        assert student.outputs is not None and teacher.outputs is not None, "both were captured"
        read = (student.outputs, batch.mask), (teacher.outputs, batch.teacher_mask)
        points, targets = (
            batch.gather(pool_tokens(states, mask, self.config.pooling)) for states, mask in read
        )
        number = len(points)
        if self.config.kind == "distance":
            relations, count = distances, number * (number - 1) // 2
        else:
            relations, count = angles, number * (number - 1) * (number - 2)
        total = smooth_l1_loss(relations(points), relations(targets), reduction="sum")
        return gathered_value(total / max(count, 1), len(student.outputs), number)


def distances(points: Tensor) -> Tensor:
    """Distances of all pairs over their mean (eq. 6).

    Args:
        points: [batch, width].

    Returns:
        [batch (batch - 1) / 2].
    """
    # of points that coincide it gives no gradient
    apart = pdist(points)
    return apart / apart.mean().clamp(min=torch.finfo(points.dtype).tiny) if len(apart) else apart


def angles(points: Tensor) -> Tensor:
    """Cosines of the angles at the second of three different points (eq. 8).

    Args:
        points: [batch, width].

    Returns:
        [batch, batch, batch], the second of the points first; 0 where two of them are the same,
        and where the second coincides with another.
    """
    # from the point of the first dimension to that of the second
    differences = points[None] - points[:, None]
    directions = normalize(differences, dim=-1)
    cosines = directions @ directions.mT
    with torch.no_grad():
        # up to rounding, of which normalize would make a direction and a gradient of up to 1e12
        sizes = points.norm(dim=-1)
        rounding = 8 * torch.finfo(points.dtype).eps * torch.maximum(sizes[:, None], sizes)
        coincide = differences.norm(dim=-1) <= rounding
    same = torch.eye(len(points), dtype=torch.bool, device=points.device)
    # by a mask, as numbers that are picked out would be counted on the host
    return cosines.masked_fill(coincide[:, :, None] | coincide[:, None, :] | same[None], 0)
