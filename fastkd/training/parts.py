"""What a run is made of: models, data, objective; loaded, built and checked on the CPU.

`gather.py` asks for them, of a distillation here, of a fine-tuning in `parts_finetune.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import (
    AttentionTraits,
    hands_on_last_block,
    try_model,
    try_packed,
)
from fastkd.data.batching import BatchPlan
from fastkd.data.datamodule import DataModule
from fastkd.data.factory import make_datamodule
from fastkd.data.mteb_tasks import load_tasks, task_digest
from fastkd.data.pairs import prepare_pairs
from fastkd.data.rows.tokenized import EncodedRows
from fastkd.data.tasks import Task
from fastkd.data.tasks.prepare import task_of
from fastkd.data.text.mlm import Masking
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.layer_map import LayerMap, make_layer_map
from fastkd.losses.factory import (
    capture_needs,
    make_objective,
)
from fastkd.losses.mlm import MlmLoss
from fastkd.losses.objective import DistilledStudent, Objective
from fastkd.losses.pooling import EmbeddingModules
from fastkd.models import (
    Initialisation,
    build_student,
    load_student,
    load_teacher,
    stands_apart,
    student_layers,
)
from fastkd.models.classifier import check_start, fit_classifier, name_outputs
from fastkd.models.importance import start_by_importance
from fastkd.recipe import AnyRecipe, FinetuneRecipe, Recipe, TaskData, resolve_steps
from fastkd.training.alike import check_alike
from fastkd.training.embeddings import (
    begin_projection,
    compare_lengths,
    find_default_prompt,
    find_embeddings,
    handed_on_prompts,
    own_pooling,
    prompt_notes,
)
from fastkd.training.export import load_projections
from fastkd.training.finite import check_weights
from fastkd.training.memory import check_micro_batch
from fastkd.training.others import ensemble_of, load_others
from fastkd.training.padding import pad_as_read
from fastkd.training.precision import check_eight_bits
from fastkd.training.run_folder import RunFolder
from fastkd.training.teacher import OtherTeacher
from fastkd.training.unrounded import unrounded
from fastkd.training.vocabularies import (
    Tokenizers,
    choose_tokenizers,
    share_stops,
    share_token_types,
)
from fastkd.types import Inputs, ModelSource

R = TypeVar("R", Recipe, FinetuneRecipe)
# by which a teacher's channels are chosen; Minitron takes 1,024 samples of calibration data
_READ_ROWS = 256


@dataclass
class Parts:
    """What a run is made of on one rank, before anything stands in an engine."""

    recipe: AnyRecipe
    """With its numbers of steps written out."""
    ranks: Ranks
    plan: BatchPlan
    datamodule: DataModule
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    """Tokenizer of the teacher; `None` where it has none of its own."""
    exported_tokenizer: PreTrainedTokenizerBase
    """Tokenizer that the student is exported with."""
    notes: Sequence[str]
    """Lines for the user about what the student is exported with: its tokenizer, where its texts
    end, prompts, the projection of its embedding."""
    layers: LayerMap
    initialisation: Initialisation
    module: DistilledStudent
    teacher_model: PreTrainedModel | None
    """The first teacher; `None` where hard labels teach."""
    others: list[OtherTeacher]
    source: ModelSource
    """The model that the student was made from."""
    start: ModelSource | None
    """The model that the student began as, where it is another one."""
    pairs: dict[str, EncodedRows]
    """Pairs of texts with scores, by name, that embeddings are judged by."""
    mteb_tasks: dict[str, Any]
    """Tasks of mteb, by name, that embeddings are judged by."""
    handed_on: dict[str, Any]
    """Values of its configuration that the student is handed on with: dropout rates, padding."""
    prompts: Mapping[str, str]
    """What stands before the texts that are read, as the student is exported with it, by name."""
    default_prompt: str
    """What stands before texts that are given none."""

    @property
    def objective(self) -> Objective:
        """The losses."""
        return self.module.objective

    @property
    def data_digests(self) -> dict[str, str]:
        """By part of the data, of all that is trained on or scored, the digest of what was read."""
        return {
            **self.datamodule.digests,
            **{f"pairs {name}": pairs.fingerprint for name, pairs in self.pairs.items()},
            **{f"mteb {name}": task_digest(task) for name, task in self.mteb_tasks.items()},
        }


@dataclass
class _Models:
    """What a distillation reads and trains, before there is data."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    others: list[OtherTeacher]
    initialisation: Initialisation
    layers: LayerMap
    tokenizers: Tokenizers
    traits: tuple[AttentionTraits, AttentionTraits]
    """Traits of the attention of student and teacher."""
    embeddings: tuple[EmbeddingModules, EmbeddingModules] | None
    """Modules that make embeddings of student and teacher, see `find_embeddings`."""
    configs: tuple[PreTrainedConfig, PreTrainedConfig]
    """Configurations of the models that the student's and the teacher's inputs are made for."""
    start: ModelSource | None
    """The model that the student began as, where it stands apart from its teacher."""
    prompts: Mapping[str, str]
    """Prompts that the student is exported with, by name."""
    notes: Sequence[str]
    """Lines for the user, as `Parts.notes`."""


def gather_distillation(
    recipe: Recipe, plan: BatchPlan, ranks: Ranks, progress: bool, made: RunFolder | None
) -> Parts:
    """Load, build and check what a distillation is made of, see `gather`."""
    # a rank whose disk fails would leave the others in what they do together
    models = ranks.on_each(partial(_models, recipe, plan, ranks.device, made))
    check_alike(_read_of(recipe, models, made), ranks)
    # before the data, which takes long to read, and may tell how many steps there are
    tasks = load_tasks(() if recipe.evaluate is None else recipe.evaluate.mteb, ranks)
    objective = ranks.on_each(partial(_objective, recipe, models, made))
    begun = [] if made is not None else begin_projection(recipe, objective, models.student)
    tokenizers, configs = models.tokenizers, models.configs
    prompt = find_default_prompt(recipe)
    pairs = _pairs(recipe, models, ranks, prompt)
    datamodule = make_datamodule(
        recipe,
        tokenizers.student,
        configs[0],
        ranks,
        masking=_masking(recipe, tokenizers.student),
        counts_padding=recipe.losses.reduction == "tinybert",
        teacher_tokenizer=tokenizers.teacher,
        teacher_config=configs[1],
        trains=made is None,
        default_prompt=prompt,
        progress=progress,
    )
    if made is None:
        recipe = resolve_recipe(recipe, datamodule)
    objective.steps = recipe.train.steps
    handed_on = dict(models.initialisation.rates)
    if HEADS[recipe.student.head].data == "task":
        others = [other.model for other in models.others]
        handed_on |= pad_as_read(datamodule, tokenizers, models.student, models.teacher, others)
    if made is None and recipe.student.init == "importance":
        _choose_channels(recipe, models, first_inputs(datamodule, recipe, plan, ranks), ranks)
    return Parts(
        recipe=recipe,
        ranks=ranks,
        plan=plan,
        datamodule=datamodule,
        tokenizer=tokenizers.student,
        teacher_tokenizer=tokenizers.teacher,
        exported_tokenizer=tokenizers.exported,
        notes=[*models.notes, *begun],
        layers=models.layers,
        initialisation=models.initialisation,
        module=DistilledStudent(models.student, objective),
        teacher_model=models.teacher,
        others=models.others,
        source=recipe.teacher.source,
        start=models.start,
        pairs=pairs,
        mteb_tasks=tasks,
        handed_on=handed_on,
        prompts=models.prompts,
        default_prompt=prompt,
    )


def _models(
    recipe: Recipe, plan: BatchPlan, device: torch.device, made: RunFolder | None
) -> _Models:
    """Load, build and try both models, and what makes embeddings of them."""
    task = None if recipe.task is None else task_of(recipe.task)
    start = recipe.student.starts_from
    teacher = _teacher(recipe, device, task)
    if task is not None and made is None and start is not None:
        check_start(start, task)
    teacher_traits = _traits(teacher, recipe)
    student, initialisation, layers = _student(recipe, teacher, made, task)
    if made is not None and start is not None:
        start = ModelSource(str(made.student))
    tokenizers = choose_tokenizers(recipe, student, teacher, start)
    notes = [*tokenizers.notes, *prompt_notes(recipe)]
    if made is None and start is not None:
        notes += share_stops(student, teacher, tokenizers, f"student.init {start.name}")
    teachers = tokenizers.teacher or tokenizers.student
    compare_lengths(recipe, recipe.teacher.source, teachers, "teacher.model")
    traits = _traits(student, recipe), teacher_traits
    if made is None:
        check_micro_batch(recipe, plan.micro_batch_size, device, *size_of_model(student))
    pooling = own_pooling(recipe, student, teacher, start)
    prompts = handed_on_prompts(recipe)
    others = load_others(recipe, teacher, teachers)
    typed = share_token_types(teacher, *(other.model for other in others))
    first = student if tokenizers.teacher else share_token_types(typed, student)
    return _Models(
        student=student,
        teacher=teacher,
        others=others,
        initialisation=initialisation,
        layers=layers,
        tokenizers=tokenizers,
        traits=traits,
        embeddings=find_embeddings(recipe, teacher.config, student.config, pooling),
        configs=(first.config, typed.config),
        start=start if stands_apart(student.config, recipe.student, teacher.config) else None,
        prompts=prompts,
        notes=notes,
    )


def _read_of(recipe: Recipe, models: _Models, made: RunFolder | None) -> dict[str, PreTrainedModel]:
    """What every rank has read for itself: a folder may have another name on another machine."""
    read = {f"teacher.others.{n}": each.model for n, each in enumerate(models.others, start=1)}
    if recipe.teacher.placement == "replicate":
        read["teacher.model"] = models.teacher
    if made is not None:
        read["student"] = models.student
    return read


def _objective(recipe: Recipe, models: _Models, made: RunFolder | None) -> Objective:
    """The losses, whose projections begin at random or as a run left them."""
    embeddings = models.embeddings
    both = models.student, models.teacher
    ends = None if embeddings is None else embeddings[1]
    objective = make_objective(
        recipe.losses,
        models.layers,
        *both,
        models.traits,
        head=recipe.student.head,
        row=() if recipe.row_form is None else recipe.row_form.sequences,
        seed=recipe.train.seed,
        embeddings=embeddings,
        ensemble=ensemble_of(recipe, ends, models.others),
        # a task's models hand on no embedding, and read no padded batch where they are packed
        last_is_output=recipe.task is None
        and bool(recipe.losses.of("hidden"))
        and all(map(hands_on_last_block, both)),
    )
    if made is not None:
        load_projections(objective, made)
    return objective


def _choose_channels(recipe: Recipe, models: _Models, read: Iterator[Inputs], ranks: Ranks) -> None:
    """Let a narrower student start from its teacher's most active channels."""
    teacher = models.teacher
    if recipe.teacher.placement == "replicate":
        teacher.to(ranks.device)
    # no head's settings are copied, only its weights
    origin = unrounded(recipe, teacher, None)
    found = start_by_importance(models.student, teacher, models.layers, read, ranks, origin)
    models.initialisation = replace(models.initialisation, copied=found)


def _teacher(recipe: Recipe, device: torch.device, task: Task | None) -> PreTrainedModel:
    """The first teacher, with a head for the task where there is one."""
    section, called = recipe.teacher, f"teacher.model {recipe.teacher.source.name}"
    check_eight_bits(section.eight_bits, device)
    teacher = load_teacher(
        section.source,
        dtype=getattr(torch, section.states),
        attention=section.attention,
        head=recipe.student.head,
    )
    check_weights(teacher, called)
    if task is not None:
        fit_classifier(teacher, task, called)
    return teacher


def first_inputs(
    datamodule: DataModule, recipe: Recipe, plan: BatchPlan, ranks: Ranks
) -> Iterator[Inputs]:
    """This rank's micro-batches of the first steps of a run, of some rows or one step at least."""
    train = recipe.train
    steps = range(-(-_READ_ROWS // train.batch_size))
    found = datamodule.micro_batches(train.batch_size, train.order, plan, ranks.rank)
    with closing(found) as micro_batches:
        for step in steps:
            yield from micro_batches.next_step(step)


def _pairs(recipe: Recipe, models: _Models, ranks: Ranks, prompt: str) -> dict[str, EncodedRows]:
    """Pairs of texts that embeddings are scored on, by name."""
    if recipe.evaluate is None or not recipe.evaluate.pairs:
        return {}
    assert recipe.data is not None, "a recipe that evaluates embeddings has text"
    return prepare_pairs(
        recipe.evaluate.pairs,
        ranks,
        tokenizer=models.tokenizers.student,
        config=models.configs[0],
        teacher_tokenizer=models.tokenizers.teacher,
        teacher_config=models.configs[1],
        cache=recipe.data.cache,
        max_length=recipe.data.block_size,
        prompt=prompt,
    )


def _masking(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Masking | None:
    """What hides tokens where a loss asks for them."""
    for loss in recipe.losses.of("mlm"):
        assert isinstance(loss, MlmLoss.Config)
        return Masking(tokenizer, loss.probability, recipe.train.order)
    return None


def _student(
    recipe: Recipe, teacher: PreTrainedModel, made: RunFolder | None, task: Task | None
) -> tuple[PreTrainedModel, Initialisation, LayerMap]:
    """The student, new or as a run made it, and the mapping of its layers."""
    source = teacher.config

    def mapped(depth: int) -> LayerMap:
        depths = depth, source.num_hidden_layers
        return make_layer_map(recipe.layer_map, *depths, seed=recipe.train.seed)

    if made is None:
        layers = mapped(student_layers(recipe.student, source))
        return *_new_student(recipe, teacher, layers, task), layers
    student, initialisation = _made_student(recipe, made, task)
    return student, initialisation, mapped(student.config.num_hidden_layers)


def _new_student(
    recipe: Recipe, teacher: PreTrainedModel, layers: LayerMap, task: Task | None
) -> tuple[PreTrainedModel, Initialisation]:
    origin = unrounded(recipe, teacher, task)
    student, initialisation = build_student(origin, recipe.student, layers)
    check_weights(student, f"student.init {recipe.student.init}")
    if task is not None:
        name_outputs(student.config, task)
    return student, initialisation


def _made_student(
    recipe: Recipe, made: RunFolder, task: Task | None
) -> tuple[PreTrainedModel, Initialisation]:
    student = load_student(
        made.student, head=recipe.student.head, attention=recipe.student.attention
    )
    if task is not None:
        fit_classifier(student, task, f"student {made.student}")
    return student, nothing_drawn(student)


def resolve_recipe(recipe: R, datamodule: DataModule) -> R:
    """The recipe with its numbers of steps written out.

    Raises:
        UserError: what `resolve_steps` raises.
    """
    try:
        train = resolve_steps(recipe.train, datamodule.rows)
    except ValueError as error:
        raise UserError(str(error)) from error
    return recipe.model_copy(update={"train": train})


def size_of_model(model: PreTrainedModel) -> tuple[int, int]:
    """Width and layers of a model, as `check_micro_batch` takes them."""
    return model.config.hidden_size, model.config.num_hidden_layers


def nothing_drawn(model: PreTrainedModel, new_head: bool = False) -> Initialisation:
    """`Initialisation` of a model that was read, not made; `new_head`: but for its head."""
    total = sum(p.numel() for p in model.parameters())
    return Initialisation(total, total, new_head)


def _traits(model: PreTrainedModel, recipe: Recipe) -> AttentionTraits:
    """Try a model on the longest sequence that a recipe has, with what its losses read."""
    needs = capture_needs(recipe.losses)
    if recipe.task is not None:
        traits = try_model(model, recipe.task.max_length, "task.max_length", **needs)
        try_without_padding(model, recipe.task)
        return traits
    assert recipe.data is not None, "a recipe has data or a task"
    return try_model(model, recipe.data.block_size, "data.block_size", **needs)


def try_without_padding(model: PreTrainedModel, task: TaskData) -> None:
    """See that a model reads examples without padding, where a task has none."""
    if task.padding == "none":
        try_packed(model, task.max_length)
