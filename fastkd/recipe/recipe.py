"""All sections together, and what must agree between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from fastkd.head_spec import HEADS, TASK_HEAD, heads_of_loss
from fastkd.layer_map.sections import Layers
from fastkd.recipe.data import Data
from fastkd.recipe.losses import Losses
from fastkd.recipe.models import Student, Teacher
from fastkd.recipe.presets import Preset
from fastkd.recipe.task import TaskData
from fastkd.recipe.train import Run, Train, check_train
from fastkd.section import Extras, Section


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
    """What is matched; of the first stage where not given."""
    data: Data | None = None
    """Text that both models read."""
    task: TaskData | None = None
    """Examples with labels that both models read, in place of text."""
    train: Train = Train()
    """How it is trained."""
    run: Run
    """Where it is written."""
    stages: tuple[dict[str, Any], ...] = ()
    """Stages of the run, one after the other: of each what differs in `losses`, `layer_map`,
    `train` and `task`."""
    deepspeed: Extras = Field(default_factory=dict)
    """Further keys of DeepSpeed's configuration; those that the recipe sets itself are refused."""

    @model_validator(mode="before")
    @classmethod
    def _first_losses(cls, tree: Any) -> Any:
        stages = tree.get("stages") if isinstance(tree, Mapping) else None
        if not isinstance(stages, list | tuple) or not stages or "losses" in tree:
            return tree
        first = stages[0]
        given = isinstance(first, Mapping) and "losses" in first
        return {**tree, "losses": first["losses"]} if given else tree

    @model_validator(mode="before")
    @classmethod
    def _head_of_a_task(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or tree.get("task") is None:
            return tree
        student = tree.get("student")
        if not isinstance(student, Mapping) or "head" in student:
            return tree
        return {**tree, "student": {**student, "head": TASK_HEAD}}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data is None and self.task is None:
            raise ValueError("data: missing; give data (text) or task (examples with labels)")
        if self.data is not None and self.task is not None:
            raise ValueError(
                "data and task are both given; give data (text) or task (examples with labels)"
            )
        self._check_maps()
        self._check_head()
        check_train(self.train)
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
        spec = HEADS[head]
        if self.task is not None and spec.data != "task":
            raise ValueError(
                f"student.head is {head}, but a task is learned by {TASK_HEAD}; leave "
                "student.head out"
            )
        if self.task is None and "labels" in terms and spec.data == "task":
            raise ValueError(
                "losses.labels learns from labelled examples, but data.train is text without "
                "labels; give task in place of data, or leave losses.labels out"
            )
        for name in terms:
            heads = heads_of_loss(name)
            if heads and head not in heads:
                raise ValueError(
                    f"losses.{name} is on, but student.head is {head}; expected "
                    f"{' or '.join(heads)}"
                )
        for name in ("labels", "mlm"):
            if name in terms and spec.language_model and "logits" not in terms:
                raise ValueError(
                    f"losses.{name} of a {head} head is computed together with losses.logits, "
                    "which is off; switch it on, with weight 0 where it should not count"
                )
