"""`losses.sentence`: embeddings of whole sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.layer_map import LayerMap
from fastkd.losses.base import Batch, Captures, Loss, LossConfig, Shared
from fastkd.losses.pooling import Pooling, pool_tokens
from fastkd.losses.registry import register_loss

if TYPE_CHECKING:
    from fastkd.capture import Capture


@register_loss("sentence")
class SentenceLoss(Loss):
    """1 - cosine of pooled sentence embeddings, mean over examples.

    The embeddings are pooled from what the models hand on after their final norm. Where the widths
    differ, a linear layer without bias takes the student's to the teacher's.
    """

    class Config(LossConfig):
        """Pooled sentence embeddings."""

        pooling: Pooling = "mean"
        """The mean of the tokens that are no padding, the first of them, or the last."""
        projection: Literal["auto", "none", "own"] = "auto"
        """From student to teacher width: none, a layer of this loss, or one where widths differ."""

    config: Config
    captures = Captures(outputs=True)

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        super().__init__(name, config, layer_map, shared)
        student, teacher = shared.pair.widths
        mode = self.config.projection
        if mode == "none" and student != teacher:
            raise UserError(
                f"losses.{name}.projection is none, but the student is {student} wide and the "
                f"teacher {teacher}; set it to own"
            )
        projected = mode == "own" or student != teacher
        self.projection = nn.Linear(student, teacher, bias=False) if projected else nn.Identity()

    def parameter_rates(self) -> dict[str, float]:
        rate = self.shared.projection_learning_rate
        return {} if rate is None else {name: rate for name, _ in self.named_parameters()}

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """A scalar, fp32."""
        assert student.outputs is not None and teacher.outputs is not None, "both were captured"
        pooling = self.config.pooling
        pooled = pool_tokens(student.outputs, batch.mask, pooling)
        target = pool_tokens(teacher.outputs, batch.mask, pooling)
        # as wide as the projection's weight, which an engine may have cast
        weight = getattr(self.projection, "weight", pooled)
        projected = self.projection(pooled.to(weight.dtype)).to(pooled.dtype)
        return (1 - nn.functional.cosine_similarity(projected, target, dim=-1)).mean()
