"""All sections together, and what must agree between them."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from fastkd.recipe.data import Data
from fastkd.recipe.layers import Layers
from fastkd.recipe.losses import Losses
from fastkd.recipe.models import Student, Teacher
from fastkd.recipe.section import Section
from fastkd.recipe.train import Run, Train


class Recipe(Section):
    """Everything about a run."""

    teacher: Teacher
    """The model to learn from."""
    student: Student
    """The model to make."""
    layer_map: Layers = "uniform"
    """Which teacher layer each student layer learns from; a list names one teacher layer for each
    student layer, 0 for none."""
    losses: Losses
    """What is matched."""
    data: Data
    """What both models read."""
    train: Train = Train()
    """How it is trained."""
    run: Run
    """Where it is written."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's configuration; those that the recipe sets itself are refused."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.layer_map, tuple) and len(self.layer_map) != self.student.layers:
            raise ValueError(
                f"layer_map names {len(self.layer_map)} teacher layers, but student.layers is "
                f"{self.student.layers}; give one for each student layer, 0 for none"
            )
        if self.train.precision == "bf16" and self.train.zero_stage == 0:
            raise ValueError(
                "train.precision is bf16 and train.zero_stage 0, where DeepSpeed takes one "
                "spurious optimiser step; use zero_stage 1"
            )
        if self.train.warmup_steps >= self.train.steps:
            raise ValueError(
                f"train.warmup_steps is {self.train.warmup_steps}, expected fewer than "
                f"train.steps ({self.train.steps})"
            )
        return self
