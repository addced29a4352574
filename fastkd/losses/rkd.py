"""`losses.rkd`: how the sentences of a micro-batch lie to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from fastkd.losses.base import Batch, Captures, Loss, LossConfig
from fastkd.losses.pooling import Pooling, pool_tokens
from fastkd.losses.registry import register_loss

if TYPE_CHECKING:
    from fastkd.capture import Capture


@register_loss("rkd")
class RelationalLoss(Loss):
    """Distances or angles among pooled embeddings (RKD, Park et al., arXiv 1904.05068, eq. 5 to 8).

    Widths may differ, as each model is compared with itself. Only sentences of one micro-batch of
    one rank meet, so unlike other losses the value depends on how a step is cut: it is the mean of
    the micro-batches' means, each weighted by its examples. A micro-batch with fewer than two
    sentences (three for angles) has nothing to compare and gives zero.
    """

    class Config(LossConfig):
        """Distances or angles among the sentences of a micro-batch."""

        kind: Literal["distance", "angle"] = "distance"
        """Distances of all pairs over their mean, or cosines of the angles of all triplets; both
        under a Huber loss."""
        pooling: Pooling = "mean"
        """The mean of the tokens that are no padding, the first of them, or the last."""

    config: Config
    captures = Captures(outputs=True)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """A scalar, fp32."""
        assert student.outputs is not None and teacher.outputs is not None, "both were captured"
        relations = distances if self.config.kind == "distance" else angles
        found, expected = (
            relations(pool_tokens(states, batch.mask, self.config.pooling))
            for states in (student.outputs, teacher.outputs)
        )
        if found.numel() == 0:
            return found.sum()
        return smooth_l1_loss(found, expected)


def distances(points: Tensor) -> Tensor:
    """Distances of all pairs over their mean (eq. 6).

    Args:
        points: [batch, width].

    Returns:
        [batch (batch - 1) / 2].
    """
    first, second = torch.triu_indices(len(points), len(points), 1, device=points.device)
    # of points that coincide the distance has no gradient
    squares = (points[first] - points[second]).square().sum(dim=-1)
    apart = squares.clamp(min=torch.finfo(points.dtype).tiny).sqrt()
    return apart / apart.mean() if apart.numel() else apart


def angles(points: Tensor) -> Tensor:
    """Cosines of the angles at the second of three different points (eq. 8).

    Args:
        points: [batch, width].

    Returns:
        [batch (batch - 1) (batch - 2)].
    """
    batch = len(points)
    # directions from the point of the first dimension to that of the second
    directions = normalize(points[None] - points[:, None], dim=-1)
    cosines = directions @ directions.mT
    same = torch.eye(batch, dtype=torch.bool, device=points.device)
    different = ~(same[:, :, None] | same[:, None, :] | same[None])
    return cosines[different]
