"""`losses.hidden`: states that the mapped blocks hand on, or that two named modules give."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import model_validator
from torch import Tensor

from fastkd.layer_map import LayerMap
from fastkd.layer_map.sections import Layers
from fastkd.losses.base import Captures, LossConfig, LossGroup, Shared
from fastkd.losses.registry import register_loss
from fastkd.losses.states import StateConfig, StateGroup, StateLoss
from fastkd.section import Name

if TYPE_CHECKING:
    from fastkd.capture import Capture


@register_loss("hidden")
class HiddenLoss(StateLoss):
    """Hidden states of the mapped layers (TinyBERT, arXiv 1909.10351, eq. 8).

    With u = W h_student + b, where the widths differ or a projection is asked for, and v the
    teacher's state of the same token:

        mse             mean over tokens and width of (u - v)^2
        normalized_mse  mean over tokens of |u / |u| - v / |v||^2
        cosine          mean over tokens of 1 - cos(u, v)

    With `student_module` and `teacher_module` what these submodules give, [batch, tokens, width]
    with the width of the model, is compared in place of layers.
    """

    class Config(StateConfig):
        """Hidden states of the mapped layers."""

        layer_map: Layers | None = None
        """Mapping of this term; the recipe's where not given."""
        student_module: Name | None = None
        """Path of a submodule of the student, such as `encoder.layer.1.output`, whose output is
        compared in place of layers."""
        teacher_module: Name | None = None
        """Path of the teacher's submodule that it learns from."""

        @model_validator(mode="after")
        def _both_modules(self) -> Self:
            if (self.student_module is None) != (self.teacher_module is None):
                raise ValueError(
                    "student_module and teacher_module are compared with each other; give both, or "
                    "neither"
                )
            if self.student_module is not None and self.layer_map is not None:
                raise ValueError(
                    "layer_map and student_module are both given, but a module is compared in "
                    "place of layers; give one of them"
                )
            return self

    config: Config
    captures = Captures(hidden=True)
    group: type[LossGroup] | None = StateGroup
    official_kind: ClassVar[str | None] = "mse"

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        assert isinstance(config, self.Config)
        student, teacher = config.student_module, config.teacher_module
        named = student is not None and teacher is not None
        super().__init__(name, config, None if named else layer_map, shared)
        if student is not None and teacher is not None:
            self.captures = Captures(modules=(student, teacher))

    def states(self, student: Capture, teacher: Capture) -> list[tuple[Tensor, list[Tensor]]]:
        if self.captures.modules is None:
            return super().states(student, teacher)
        path, teacher_path = self.captures.modules
        return [(student.modules[path], [teacher.modules[teacher_path]])]
