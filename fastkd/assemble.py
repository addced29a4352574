"""Put a recipe's parts together: data, teacher, student, mapping, objective.

Everything that can be wrong with a recipe on this machine is found here, before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import (
    attention_windows,
    check_capturable,
    check_positions,
    is_causal,
    vector_widths,
)
from fastkd.classifiers import check_classifier, load_tuned, name_outputs, pad_alike
from fastkd.deepspeed_config import BatchPlan, plan_batches, student_config
from fastkd.engine import DistilledStudent, NoTeacher, Ranks, TeacherRunner, make_engine
from fastkd.errors import UserError
from fastkd.layer_map import LayerMap, make_layer_map
from fastkd.material import Material, TaskMaterial, make_material, task_of
from fastkd.models import (
    Initialisation,
    build_student,
    dropout_rates,
    load_teacher,
    load_tokenizer,
)
from fastkd.objective import ModelPair, Objective
from fastkd.recipe import (
    AnyRecipe,
    FinetuneRecipe,
    LabelsLoss,
    Losses,
    Recipe,
    Teacher,
    resolve_steps,
)

R = TypeVar("R", Recipe, FinetuneRecipe)


@dataclass
class Assembly:
    """The parts of one run, on one rank."""

    recipe: AnyRecipe
    """With its numbers of steps written out."""
    ranks: Ranks
    plan: BatchPlan
    material: Material
    tokenizer: PreTrainedTokenizerBase
    layers: LayerMap
    initialisation: Initialisation
    module: DistilledStudent
    teacher: TeacherRunner | NoTeacher
    engine: Any
    source: Teacher
    """The model that the student was made from."""
    rates: dict[str, float] = field(default_factory=dict)
    """Dropout rates that the student is handed on with."""

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
    plan = plan_batches(recipe, ranks.world_size)
    config = student_config(recipe, plan)
    torch.manual_seed(recipe.train.seed)
    if isinstance(recipe, Recipe):
        return _distillation(recipe, plan, config, ranks, progress)
    return _finetuning(recipe, plan, config, ranks, progress)


def _distillation(
    recipe: Recipe, plan: BatchPlan, config: dict[str, Any], ranks: Ranks, progress: bool
) -> Assembly:
    task = None if recipe.task is None else task_of(recipe.task)
    teacher = load_teacher(recipe.teacher, recipe.student.head)
    if task is not None:
        check_classifier(teacher, task, f"teacher.model {recipe.teacher.model}")
    length, field_name = _longest(recipe)
    check_capturable(teacher, length, field_name)
    tokenizer = load_tokenizer(recipe.teacher, teacher.get_input_embeddings().num_embeddings)
    depths = recipe.student.layers, teacher.config.num_hidden_layers
    layers = make_layer_map(recipe.layer_map, *depths, seed=recipe.train.seed)
    student, initialisation = build_student(teacher, recipe.student, layers)
    if task is not None:
        name_outputs(student.config, task)
    check_capturable(student, length, field_name)
    # before the data, which takes long to read, and may tell how many steps there are
    objective = make_objective(recipe, layers, student, teacher)
    material = make_material(recipe, tokenizer, teacher.config, ranks, progress=progress)
    recipe = _resolved(recipe, material)
    objective.steps = recipe.train.steps
    if isinstance(material, TaskMaterial):
        for model in (teacher, student):
            pad_alike(model, material.train.pad_id)
    module = DistilledStudent(student, objective)
    runner = TeacherRunner(teacher, recipe, objective, ranks)
    engine = _engine(module, recipe, config, ranks)
    return Assembly(
        recipe,
        ranks,
        plan,
        material,
        tokenizer,
        layers,
        initialisation,
        module,
        runner,
        engine,
        recipe.teacher,
        dropout_rates(teacher.config),
    )


def _finetuning(
    recipe: FinetuneRecipe, plan: BatchPlan, config: dict[str, Any], ranks: Ranks, progress: bool
) -> Assembly:
    task = task_of(recipe.task)
    source = recipe.model.source
    tuned = load_tuned(recipe.model, task)
    model = tuned.model
    check_positions(model, recipe.task.max_length, "task.max_length")
    tokenizer = load_tokenizer(source, model.get_input_embeddings().num_embeddings)
    material = make_material(recipe, tokenizer, model.config, ranks, progress=progress)
    assert isinstance(material, TaskMaterial), "a fine-tuning recipe has a task"
    recipe = _resolved(recipe, material)
    pad_alike(model, material.train.pad_id)
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    layers = make_layer_map("uniform", depth, depth)
    pair = ModelPair(
        widths=(width, width), head="sequence_classification", outputs=model.config.num_labels
    )
    losses = Losses(labels=LabelsLoss())
    objective = Objective(losses, layers, pair, steps=recipe.train.steps)
    module = DistilledStudent(model, objective)
    total = sum(p.numel() for p in model.parameters())
    engine = _engine(module, recipe, config, ranks)
    return Assembly(
        recipe,
        ranks,
        plan,
        material,
        tokenizer,
        layers,
        Initialisation(total, total, tuned.new_head),
        module,
        NoTeacher(),
        engine,
        source,
        tuned.rates,
    )


def _resolved(recipe: R, material: Material) -> R:
    try:
        train = resolve_steps(recipe.train, material.rows)
    except ValueError as error:
        raise UserError(str(error)) from error
    return recipe.model_copy(update={"train": train})


def _engine(
    module: DistilledStudent, recipe: AnyRecipe, config: dict[str, Any], ranks: Ranks
) -> Any:
    # what transformers reads is in eval mode, and a continued run starts with a step
    engine = make_engine(module.train(), recipe.train, config, ranks)
    # dropout must differ between ranks; everything before must not
    torch.manual_seed(recipe.train.seed + 1 + ranks.rank)
    return engine


def _longest(recipe: Recipe) -> tuple[int, str]:
    """Tokens that the models must be able to read, and the field that says so."""
    if recipe.task is not None:
        return recipe.task.max_length, "task.max_length"
    assert recipe.data is not None, "a recipe has data or a task"
    return recipe.data.block_size, "data.block_size"


def make_objective(
    recipe: Recipe, layers: LayerMap, student: PreTrainedModel, teacher: PreTrainedModel
) -> Objective:
    """The objective of a recipe for two models.

    Raises:
        UserError: the models don't fit together.
    """
    losses = recipe.losses
    heads = student.config.num_attention_heads, teacher.config.num_attention_heads
    if losses.attention and heads[0] != heads[1]:
        raise UserError(
            f"losses.attention compares heads one by one, but the student has {heads[0]} and the "
            f"teacher {heads[1]}; set student.heads={heads[1]}, or leave the term out"
        )
    compares = losses.relations or (losses.attention and losses.attention.kind != "score_mse")
    pair = ModelPair(
        widths=(student.config.hidden_size, teacher.config.hidden_size),
        causal=is_causal(teacher),
        heads=heads,
        vectors=(vector_widths(student), vector_widths(teacher)),
        windows=(attention_windows(student), attention_windows(teacher)) if compares else ({}, {}),
        head=recipe.student.head,
        outputs=teacher.config.num_labels,
    )
    depths = layers.student_layers, layers.teacher_layers
    own = {
        name: make_layer_map(given, *depths, seed=recipe.train.seed)
        for name, term in losses.terms.items()
        if (given := getattr(term, "layer_map", None)) is not None
    }
    return Objective(losses, layers, pair, own_layers=own, steps=recipe.train.steps)
