"""The recipe of `fastkd finetune`: one model, a task, hard labels."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from fastkd.recipe.models import Attention, check_flex
from fastkd.recipe.task import TaskData, check_padding, check_predictions
from fastkd.recipe.train import RunOutput, Train, check_steering, check_train
from fastkd.section import (
    Extras,
    Place,
    Plugins,
    Section,
)
from fastkd.types import ModelSource


class TunedModel(Section):
    """The model that is trained; where it has no head for the task, one is drawn by the seed."""

    name: Place
    """Hub name, folder, or `package:NAME/FOLDER` for a model carried by an installed package."""
    revision: Place | None = None
    """Branch, tag or commit on the hub."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected digest of `model.safetensors`, checked before use."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Every dropout rate; the model's own where not given."""
    attention: Attention = "sdpa"
    """Attention implementation that the model runs."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass (non-reentrant)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_flex(self.attention, self.dropout, self.gradient_checkpointing)
        return self

    @property
    def source(self) -> ModelSource:
        """Where it is loaded from."""
        return ModelSource(self.name, self.revision, self.sha256)


def _short_model(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class FinetuneTrain(Train):
    """The loop, with the learning rates of a model that is tuned."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate, of either optimiser. A model that is tuned takes a lower one than a
    student, so that it keeps what it was pre-trained to: BERT 2e-5 to 5e-5 (arXiv 1810.04805,
    appendix A.3)."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps, in place of `warmup_steps`; 0 where those are given and this is not.
    Without a warm-up a head that was just drawn moves the whole model at the peak rate."""

    @model_validator(mode="before")
    @classmethod
    def _without_share(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and "warmup_steps" in tree:
            return {"warmup_share": 0.0, **tree}
        return tree


class FinetuneRecipe(Section):
    """Everything about a fine-tuning run."""

    plugins: Plugins = ()
    """Modules that are imported before the rest is read."""
    model: Annotated[TunedModel, BeforeValidator(_short_model)]
    """The model that is trained: its name, or a section."""
    task: TaskData
    """What it learns."""
    train: FinetuneTrain = FinetuneTrain()
    """How it is trained."""
    run: RunOutput
    """Where it is written."""
    deepspeed: Extras = Field(default_factory=dict)
    """Further keys of DeepSpeed's configuration; those that the recipe sets itself are refused."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_train(self.train)
        check_steering(self.train, self.run)
        check_predictions(self.task, self.run)
        check_padding(self.task, self.train, {"model.attention": self.model.attention})
        return self
