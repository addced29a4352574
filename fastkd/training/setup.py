"""Put a recipe's parts together: data, teacher, student, mapping, objective.

Everything that can be wrong with a recipe on this machine is found here, before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import AttentionTraits, try_model, vocabulary_size
from fastkd.data.batching import BatchPlan, plan_batches
from fastkd.data.datamodule import DataModule
from fastkd.data.factory import make_datamodule, task_of
from fastkd.data.tasks import hand_on_padding, reads_padding
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.distributed import Ranks
from fastkd.errors import FOREIGN_ERRORS, UserError
from fastkd.head_spec import HEADS
from fastkd.layer_map import LayerMap, make_layer_map
from fastkd.losses import Objective
from fastkd.losses.factory import capture_needs, hard_objective, make_objective
from fastkd.models import (
    Initialisation,
    build_student,
    check_same_vocabulary,
    dropout_rates,
    load_teacher,
    load_tokenizer,
)
from fastkd.models.classifier import (
    check_start,
    fit_classifier,
    load_tuned,
    name_outputs,
)
from fastkd.recipe import (
    AnyRecipe,
    FinetuneRecipe,
    Recipe,
    Teacher,
    resolve_steps,
)
from fastkd.training.deepspeed_config import check_packages, student_config
from fastkd.training.engine import (
    DistilledStudent,
    NoTeacher,
    TeacherRunner,
    check_config,
    make_engine,
    refusal,
)
from fastkd.training.finite import check_weights
from fastkd.training.memory import check_micro_batch

R = TypeVar("R", Recipe, FinetuneRecipe)


@dataclass
class Assembly:
    """The parts of one run, on one rank."""

    recipe: AnyRecipe
    """With its numbers of steps written out."""
    ranks: Ranks
    plan: BatchPlan
    datamodule: DataModule
    tokenizer: PreTrainedTokenizerBase
    layers: LayerMap
    initialisation: Initialisation
    module: DistilledStudent
    teacher: TeacherRunner | NoTeacher
    engine: Any
    source: Teacher
    """The model that the student was made from."""
    handed_on: dict[str, Any] = field(default_factory=dict)
    """Values of its configuration that the student is handed on with: dropout rates, padding."""

    @property
    def objective(self) -> Objective:
        """The losses."""
        return self.module.objective

    @property
    def teacher_parameters(self) -> int:
        """Numbers in the teacher, its pooler left out; 0 without one."""
        if isinstance(self.teacher, NoTeacher):
            return 0
        # a sharded parameter keeps its real size in ds_numel
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.teacher.model.parameters())


def assemble(recipe: AnyRecipe, ranks: Ranks, *, progress: bool = True) -> Assembly:
    """Load, build and check everything that a run needs; collective over the ranks.

    Args:
        recipe: what to build.
        ranks: from `start_ranks`.
        progress: whether reading data shows bars.

    Raises:
        UserError: anything about the recipe that does not work on this machine.
    """
    check_packages(recipe)
    plan = plan_batches(recipe, ranks.world_size)
    config = student_config(recipe, plan)
    check_config(config)
    check_micro_batch(recipe, plan.micro_batch_size, ranks.device)
    torch.manual_seed(recipe.train.seed)
    if isinstance(recipe, Recipe):
        return _distillation(recipe, plan, config, ranks, progress)
    return _finetuning(recipe, plan, config, ranks, progress)


@dataclass
class Parts:
    """What a distillation is made of, before anything stands in an engine."""

    recipe: Recipe
    datamodule: DataModule
    tokenizer: PreTrainedTokenizerBase
    layers: LayerMap
    initialisation: Initialisation
    module: DistilledStudent
    teacher: PreTrainedModel
    handed_on: dict[str, Any]


def _distillation(
    recipe: Recipe, plan: BatchPlan, config: dict[str, Any], ranks: Ranks, progress: bool
) -> Assembly:
    parts = gather(recipe, plan, ranks, progress=progress)
    recipe, module = parts.recipe, parts.module
    return Assembly(
        recipe,
        ranks,
        plan,
        parts.datamodule,
        parts.tokenizer,
        parts.layers,
        parts.initialisation,
        module,
        TeacherRunner(parts.teacher, recipe, module.objective, ranks),
        _engine(module, recipe, config, ranks),
        recipe.teacher,
        parts.handed_on,
    )


def gather(recipe: Recipe, plan: BatchPlan, ranks: Ranks, *, progress: bool) -> Parts:
    """Load, build and check the parts of a distillation, on the CPU; as `assemble`."""
    task = None if recipe.task is None else task_of(recipe.task)
    teacher = load_teacher(recipe.teacher, recipe.student.head)
    check_weights(teacher, f"teacher.model {recipe.teacher.model}")
    if task is not None:
        fit_classifier(teacher, task, f"teacher.model {recipe.teacher.model}")
        check_start(recipe.student, task)
    teacher_traits = try_for(teacher, recipe)
    tokenizer = load_tokenizer(recipe.teacher, vocabulary_size(teacher))
    depths = recipe.student.layers, teacher.config.num_hidden_layers
    layers = make_layer_map(recipe.layer_map, *depths, seed=recipe.train.seed)
    student, initialisation = build_student(teacher, recipe.student, layers)
    start = recipe.student.starts_from
    check_weights(student, f"student.init {recipe.student.init}")
    if start is not None:
        check_same_vocabulary(start, f"student.init {start.model}", tokenizer)
    if task is not None:
        name_outputs(student.config, task)
    traits = try_for(student, recipe), teacher_traits
    check_micro_batch(recipe, plan.micro_batch_size, ranks.device, *_size(student))
    # before the data, which takes long to read, and may tell how many steps there are
    objective = make_objective(
        recipe.losses,
        layers,
        student,
        teacher,
        traits,
        head=recipe.student.head,
        seed=recipe.train.seed,
    )
    datamodule = make_datamodule(recipe, tokenizer, teacher.config, ranks, progress=progress)
    recipe = _resolved(recipe, datamodule)
    objective.steps = recipe.train.steps
    handed_on = dropout_rates(teacher.config)
    if HEADS[recipe.student.head].data == "task":
        handed_on |= pad_alike(datamodule, tokenizer, student, teacher)
    module = DistilledStudent(student, objective)
    return Parts(recipe, datamodule, tokenizer, layers, initialisation, module, teacher, handed_on)


def _finetuning(
    recipe: FinetuneRecipe, plan: BatchPlan, config: dict[str, Any], ranks: Ranks, progress: bool
) -> Assembly:
    task = task_of(recipe.task)
    source = recipe.model.source
    tuned = load_tuned(recipe.model, task)
    model = tuned.model
    check_weights(model, f"model.name {source.model}")
    try_model(model, recipe.task.max_length, "task.max_length", attention=False, hidden=False)
    tokenizer = load_tokenizer(source, vocabulary_size(model))
    check_micro_batch(recipe, plan.micro_batch_size, ranks.device, *_size(model))
    datamodule = make_datamodule(recipe, tokenizer, model.config, ranks, progress=progress)
    assert isinstance(datamodule, TaskDataModule), "a fine-tuning recipe has a task"
    recipe = _resolved(recipe, datamodule)
    handed_on = tuned.rates | pad_alike(datamodule, tokenizer, model)
    objective, layers = hard_objective(model, recipe.train.steps)
    module = DistilledStudent(model, objective)
    total = sum(p.numel() for p in model.parameters())
    engine = _engine(module, recipe, config, ranks)
    return Assembly(
        recipe,
        ranks,
        plan,
        datamodule,
        tokenizer,
        layers,
        Initialisation(total, total, tuned.new_head),
        module,
        NoTeacher(),
        engine,
        source,
        handed_on,
    )


def pad_alike(
    datamodule: DataModule, tokenizer: PreTrainedTokenizerBase, *models: PreTrainedModel
) -> dict[str, Any]:
    """Tell classifiers which token pads: a decoder's head reads the last token before it.

    Returns:
        What the configuration of the first of them is handed on with, see `hand_on_padding`.
    """
    config = models[0].config
    kept = getattr(config, "pad_token_id", None)
    if isinstance(datamodule, TaskDataModule):
        pad = datamodule.train.pad_id
        if reads_padding(models[0]):
            kept = hand_on_padding(config, tokenizer, pad, datamodule.sets)
    else:
        # blocks of text have no padding, and a decoder that knows of none reads no batch
        pad = -1 if kept is None else kept
    for model in models:
        model.config.pad_token_id = pad
    return {"pad_token_id": kept}


def _resolved(recipe: R, datamodule: DataModule) -> R:
    try:
        train = resolve_steps(recipe.train, datamodule.rows)
    except ValueError as error:
        raise UserError(str(error)) from error
    return recipe.model_copy(update={"train": train})


def _size(model: PreTrainedModel) -> tuple[int, int]:
    return model.config.hidden_size, model.config.num_hidden_layers


def _engine(
    module: DistilledStudent, recipe: AnyRecipe, config: dict[str, Any], ranks: Ranks
) -> Any:
    # what transformers reads is in eval mode, and a continued run starts with a step
    try:
        engine = make_engine(module.train(), recipe.train, config, ranks)
    except FOREIGN_ERRORS as error:
        if isinstance(error, UserError) or not recipe.deepspeed:
            raise
        raise UserError(refusal(error)) from error
    # dropout must differ between ranks; everything before must not
    torch.manual_seed(recipe.train.seed + 1 + ranks.rank)
    return engine


def try_for(model: PreTrainedModel, recipe: Recipe) -> AttentionTraits:
    """Try a model on the longest sequence that a recipe has, with what its losses read."""
    needs = capture_needs(recipe.losses)
    if recipe.task is not None:
        return try_model(model, recipe.task.max_length, "task.max_length", **needs)
    assert recipe.data is not None, "a recipe has data or a task"
    return try_model(model, recipe.data.block_size, "data.block_size", **needs)
