"""What a fine-tuning is made of: the model that hard labels teach, its data and its objective."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from fastkd.capture import try_model, vocabulary_size
from fastkd.data.batching import BatchPlan
from fastkd.data.factory import make_datamodule
from fastkd.data.tasks.prepare import task_of
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.losses.factory import hard_objective
from fastkd.losses.objective import DistilledStudent
from fastkd.models import load_tokenizer
from fastkd.models.classifier import Tuned, load_tuned
from fastkd.recipe import FinetuneRecipe
from fastkd.training.finite import check_weights
from fastkd.training.memory import check_micro_batch
from fastkd.training.padding import pad_alike
from fastkd.training.parts import (
    Parts,
    nothing_drawn,
    resolve_recipe,
    size_of_model,
    try_without_padding,
)
from fastkd.training.run_folder import RunFolder
from fastkd.types import ModelSource


def gather_finetuning(
    recipe: FinetuneRecipe, plan: BatchPlan, ranks: Ranks, progress: bool, made: RunFolder | None
) -> Parts:
    """Load, build and check what a fine-tuning is made of, see `gather`."""
    # as of a distillation
    tuned, tokenizer = ranks.on_each(partial(_models, recipe, plan, ranks.device, made))
    model, task = tuned.model, task_of(recipe.task)
    datamodule = make_datamodule(
        recipe, tokenizer, model.config, ranks, trains=made is None, progress=progress
    )
    if made is None:
        recipe = resolve_recipe(recipe, datamodule)
    handed_on = tuned.rates | pad_alike(datamodule, tokenizer, model)
    objective, layers = hard_objective(model, task.kind, recipe.train.steps)
    return Parts(
        recipe=recipe,
        ranks=ranks,
        plan=plan,
        datamodule=datamodule,
        tokenizer=tokenizer,
        teacher_tokenizer=None,
        exported_tokenizer=tokenizer,
        notes=(),
        layers=layers,
        initialisation=nothing_drawn(model, tuned.new_head),
        module=DistilledStudent(model, objective),
        teacher_model=None,
        others=[],
        source=_source(recipe, made),
        start=None,
        pairs={},
        mteb_tasks={},
        handed_on=handed_on,
        prompts={},
        default_prompt="",
    )


def _source(recipe: FinetuneRecipe, made: RunFolder | None) -> ModelSource:
    return recipe.model.source if made is None else ModelSource(str(made.student))


def _models(
    recipe: FinetuneRecipe, plan: BatchPlan, device: torch.device, made: RunFolder | None
) -> tuple[Tuned, PreTrainedTokenizerBase]:
    """Load and try the model, with its tokenizer."""
    task, section = task_of(recipe.task), recipe.model
    source = _source(recipe, made)
    tuned = load_tuned(
        source,
        task,
        dropout=section.dropout,
        attention=section.attention,
        gradient_checkpointing=section.gradient_checkpointing,
    )
    if made is not None and tuned.new_head:
        raise UserError(f"{made.student} holds no head for task {task.name}; tune it again")
    model = tuned.model
    if made is None:
        check_weights(model, f"model.name {source.name}")
    try_model(model, recipe.task.max_length, "task.max_length", attention=False, hidden=False)
    try_without_padding(model, recipe.task)
    tokenizer = load_tokenizer(source, vocabulary_size(model))
    if made is None:
        check_micro_batch(recipe, plan.micro_batch_size, device, *size_of_model(model))
    return tuned, tokenizer
