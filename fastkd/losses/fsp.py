"""`losses.fsp`: how states flow from one layer to a later one."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd.errors import UserError
from fastkd.layer_map import LayerMap
from fastkd.layer_map.sections import Layers
from fastkd.losses.base import Batch, Captures, Loss, LossConfig, LossInfo, Shared
from fastkd.losses.registry import register_loss

if TYPE_CHECKING:
    from fastkd.capture import Capture


@register_loss("fsp")
class FlowLoss(Loss):
    """Gram matrices between neighbouring mapped layers (flow of solution procedure, Yim et al.,
    CVPR 2017, eq. 1 and 2).

    Of an example, G = F_1^T F_2 / tokens, [width, width], of the states F [tokens, width] of a link
    and the next; the loss is the mean over examples of the mean squared difference of the student's
    and the teacher's. Both models must be equally wide.
    """

    class Config(LossConfig):
        """Gram matrices between neighbouring mapped layers."""

        layer_map: Layers | None = None
        """Mapping of this term, of two links or more; the recipe's where not given."""

    captures = Captures(hidden=True)

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        super().__init__(name, config, layer_map, shared)
        student, teacher = shared.pair.widths
        if student != teacher:
            raise UserError(
                f"losses.{name} compares matrices of the models' widths, but the student is "
                f"{student} wide and the teacher {teacher}; set student.hidden_size={teacher}, or "
                "leave the term out"
            )
        rising = [link.student for link in self.links]
        alone = all(len(link.teachers) == 1 and link.weight == 1.0 for link in self.links)
        if len(rising) < 2 or rising != sorted(set(rising)) or not alone:
            raise UserError(
                f"losses.{name} goes from each mapped layer to the next, for which layer_map must "
                "have two student layers or more, each with one teacher layer; give the term one "
                "of its own, such as uniform"
            )

    @property
    def matches(self) -> tuple[LossInfo, ...]:
        # named by both links: 1-2..2-4
        labels = [f"{first}..{second}" for first, second in itertools.pairwise(self.labels)]
        return tuple(LossInfo(self.name, self.name, label, self.mean_over) for label in labels)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """Losses [links - 1], fp32."""
        losses = []
        for first, second in itertools.pairwise(self.links):
            found = gram(student.hidden[first.student], student.hidden[second.student], batch.mask)
            (one,), (other,) = first.teachers, second.teachers
            expected = gram(teacher.hidden[one], teacher.hidden[other], batch.mask)
            losses.append((found - expected).square().mean())
        return torch.stack(losses)


def gram(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    """F_1^T F_2 over tokens that are no padding, divided by their number.

    Args:
        first, second: [batch, tokens, width].
        mask: bool [batch, tokens], `None` where nothing is padded.

    Returns:
        [batch, width, width], in fp32 or better.
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    first, second = first.to(dtype), second.to(dtype)
    if mask is None:
        return first.mT @ second / first.shape[1]
    valid = mask.unsqueeze(-1).to(dtype)
    return (first * valid).mT @ (second * valid) / valid.sum(dim=1, keepdim=True).clamp(min=1)
