"""`losses.labels`: hard labels."""

from __future__ import annotations

from typing import ClassVar

from fastkd.head_spec import HEADS, heads_of_loss
from fastkd.losses.base import LossConfig, Setting
from fastkd.losses.heads import HardLoss
from fastkd.losses.registry import register_loss
from fastkd.types import Head


@register_loss("labels")
class LabelsLoss(HardLoss):
    """Cross-entropy of classes or of the next token, squared error of a number.

    The student alone against the labels of a task, or against the text: - log p(label) of its
    softmax at temperature 1, a mean over labels, weighted where `task.class_weights` says so.
    """

    class Config(LossConfig):
        """Hard labels: cross-entropy of classes or of the next token, squared error of a number."""

    heads: ClassVar[tuple[Head, ...]] = heads_of_loss("labels")

    @classmethod
    def check_setting(cls, name: str, config: LossConfig, setting: Setting) -> None:
        if HEADS[setting.head].data == "task" and not setting.labelled:
            raise ValueError(
                f"losses.{name} learns from labelled examples, but data.train is text without "
                f"labels; give task in place of data, or leave losses.{name} out"
            )
        super().check_setting(name, config, setting)
