"""All sections together, and what must agree between them."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from fastkd.recipe.data import Data
from fastkd.recipe.layers import Layers
from fastkd.recipe.losses import Losses
from fastkd.recipe.models import Student, Teacher
from fastkd.recipe.presets import Preset
from fastkd.recipe.section import Section
from fastkd.recipe.train import Run, Train


class Recipe(Section):
    """Everything about a run."""

    preset: Preset | None = None
    """Published method whose settings stand where this recipe gives none."""
    teacher: Teacher
    """The model to learn from."""
    student: Student
    """The model to make."""
    layer_map: Layers = "uniform"
    """Which teacher layer each student layer learns from: a word, a section for a mapping with
    options, or a list that names one teacher layer for each student layer, 0 for none."""
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
        self._check_maps()
        self._check_head()
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

    def _check_maps(self) -> None:
        maps: dict[str, object] = {"layer_map": self.layer_map}
        for name, term in self.losses.terms.items():
            maps[f"losses.{name}.layer_map"] = getattr(term, "layer_map", None)
        for field, layers in maps.items():
            if isinstance(layers, tuple) and len(layers) != self.student.layers:
                raise ValueError(
                    f"{field} names {len(layers)} teacher layers, but student.layers is "
                    f"{self.student.layers}; give one for each student layer, 0 for none"
                )

    def _check_head(self) -> None:
        head, terms = self.student.head, self.losses.terms
        fitting = {
            "logits": ("sequence_classification", "causal_lm", "masked_lm"),
            "labels": ("sequence_classification", "causal_lm"),
            "mlm": ("masked_lm",),
        }
        for name, heads in fitting.items():
            if name in terms and head not in heads:
                raise ValueError(
                    f"losses.{name} is on, but student.head is {head}; expected "
                    f"{' or '.join(heads)}"
                )
        for name in ("labels", "mlm"):
            if name in terms and head in ("causal_lm", "masked_lm") and "logits" not in terms:
                raise ValueError(
                    f"losses.{name} of a {head} head is computed together with losses.logits, "
                    "which is off; switch it on, with weight 0 where it should not count"
                )
