"""Held-out numbers: every loss of every layer pair, and what the datamodule's evaluator says."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from fastkd.capture import vocabulary_size
from fastkd.capture.lm_head import overheard
from fastkd.data.batching import plan_batches
from fastkd.data.datamodule import DataModule, EvalBatch
from fastkd.data.factory import make_datamodule, task_of
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.layer_map import Progress, make_layer_map
from fastkd.losses import Objective
from fastkd.losses.factory import hard_objective, make_objective
from fastkd.models import load_student, load_teacher, load_tokenizer
from fastkd.models.classifier import fit_classifier, load_tuned
from fastkd.recipe import FinetuneRecipe, Recipe, stage_recipes
from fastkd.training.deepspeed_config import check_packages
from fastkd.training.engine import (
    DistilledStudent,
    NoTeacher,
    TeacherRunner,
)
from fastkd.training.export import load_projections
from fastkd.training.finite import (
    blame,
    first_broken,
    teacher_fault,
)
from fastkd.training.run_folder import RunFolder
from fastkd.training.setup import (
    Assembly,
    pad_alike,
    try_for,
)
from fastkd.types import Inputs

# a step's forward: (inputs) or (inputs, teacher's capture, shares)
Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_REMEDY = "train it with a smaller train.learning_rate, in another run.output"

# what an evaluation may replace
_REPLACEABLE = ("data", "task", "teacher", "train", "student.attention", "model.attention")


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out data."""

    losses: dict[str, float]
    """Raw loss by label: the term, or `term/student layer-teacher layer`."""
    total: float
    """Weighted sum of the losses, see `Objective.total`."""
    judged: dict[str, Any]
    """Of text `sentence_cosine` (cosine of mean-pooled last hidden states, `None` where the widths
    differ), `blocks` and `tokens`; of a task `score`, `scores` by set and metric, `examples`."""
    teacher: dict[str, Any] | None = None
    """The same of the teacher, where it was asked for."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"losses": self.losses, "total": self.total, **self.judged}


def evaluate(
    student: Forward,
    model: PreTrainedModel,
    teacher: TeacherRunner | NoTeacher,
    objective: Objective,
    datamodule: DataModule,
    micro_batch_size: int,
    ranks: Ranks,
    *,
    judge_teacher: bool = False,
) -> Evaluation:
    """Evaluate on held-out data, split over the ranks; each model reads it once.

    Args:
        student: a `DistilledStudent` or the engine around one, in eval mode.
        model: the student itself.
        teacher: on the same device.
        objective: whose losses are reported.
        datamodule: whose held-out data is read.
        micro_batch_size: blocks or examples in one forward pass.
        ranks: a forward pass may be collective, so every rank makes equally many.
        judge_teacher: whether to evaluator the teacher's outputs too, where they have a score.

    Raises:
        UserError: a number that is not finite, with who made it.
    """
    parts = list(datamodule.heldout(micro_batch_size, ranks))
    whole = ranks.sum(sum_divisors(objective, parts).to(ranks.device)).clamp(min=1)
    losses = torch.zeros(len(objective.labels), dtype=torch.float64, device=ranks.device)
    compares = datamodule.reads == "states"
    evaluator, of_teacher = datamodule.evaluator(ranks), None
    with ExitStack() as stack:
        mine, theirs = stack.enter_context(overheard(model, datamodule.reads)), None
        if isinstance(teacher, TeacherRunner) and (compares or judge_teacher):
            theirs = stack.enter_context(overheard(teacher.model, datamodule.reads))
            of_teacher = None if compares else datamodule.evaluator(ranks, "teacher")
        stack.enter_context(torch.no_grad())
        for part in parts:
            inputs = move(part.inputs, ranks)
            shares = (objective.divisors(inputs) / whole).float()
            # a teacher's outputs need all of its layers, its losses perhaps not
            states = teacher.capture(inputs, whole=theirs is not None)
            losses += float(len(part.rows) > 0) * student(inputs, states, shares)[1][0]
            evaluator.add(part.rows, mine.output, theirs.output if theirs else None)
            if theirs and of_teacher:
                of_teacher.add(part.rows, theirs.output, None)
    by_label = dict(zip(objective.labels, ranks.sum(losses).tolist(), strict=True))

    def refuse(name: str) -> NoReturn:
        batches = (move(part.inputs, ranks) for part in parts)
        said = blame(teacher_fault(teacher, batches, ranks), teacher, _REMEDY)
        raise UserError(f"held out: {name} is not finite: {said}")

    if broken := first_broken(by_label):
        refuse(f"loss {broken}")
    found = of_teacher.results(ranks) if of_teacher else None
    result = Evaluation(by_label, objective.total(by_label), evaluator.results(ranks), found)
    if broken := first_broken(result.as_dict()):
        refuse(broken)
    return result


def sum_divisors(objective: Objective, parts: Sequence[EvalBatch]) -> torch.Tensor:
    """What the parts that count hold of every divisor, fp64 [DIVISORS] on the CPU."""
    counts = [float(len(part.rows) > 0) * objective.divisors(part.inputs) for part in parts]
    return torch.stack(counts).sum(dim=0)


def evaluate_assembly(assembly: Assembly, *, judge_teacher: bool = False) -> Evaluation:
    """Evaluate a run's student on its held-out data, and its teacher if asked to."""
    assembly.engine.eval()
    # the same layers every time, also where a mapping is drawn anew
    assembly.objective.at(Progress())
    result = evaluate(
        assembly.engine,
        assembly.module.student,
        assembly.teacher,
        assembly.objective,
        assembly.datamodule,
        assembly.plan.micro_batch_size,
        assembly.ranks,
        judge_teacher=judge_teacher,
    )
    assembly.engine.train()
    return result


def evaluate_run(run: RunFolder, overrides: Sequence[str], ranks: Ranks) -> Evaluation:
    """Evaluate what a run exported, on its own held-out data or on another.

    Args:
        run: a finished run, of a distillation or a fine-tuning.
        overrides: dotted keys of `data`, `task`, `teacher` or `train` that replace the run's.
        ranks: from `start_ranks`.

    Raises:
        UserError: the run is not finished, or an override does not fit.
    """
    check_overrides(overrides)
    summary = run.read_summary()
    if summary is None or not run.student.is_dir():
        raise UserError(
            f"{run.path} holds no finished run; give the folder of one, or finish it with --resume"
        )
    recipe = run.read_recipe(overrides)
    check_packages(recipe)
    if isinstance(recipe, Recipe) and recipe.stages:
        recipe = stage_recipes(recipe)[-1]
        summary = summary["stages"][-1]
        run = RunFolder(run.path / Path(recipe.run.output).name)
    steps = recipe.train.steps or summary["steps"]
    if isinstance(recipe, FinetuneRecipe):
        return _evaluate_tuned(run, recipe, steps, ranks)
    if overrides and recipe.data is not None:
        # a stream reads no more of the text than it needs
        data = recipe.data.model_copy(update={"streaming": True})
        recipe = recipe.model_copy(update={"data": data})
    teacher = load_teacher(recipe.teacher, recipe.student.head)
    tokenizer = load_tokenizer(recipe.teacher, vocabulary_size(teacher))
    student = load_student(run.student, recipe.student)
    if recipe.task is not None:
        fit_classifier(teacher, task_of(recipe.task), f"teacher.model {recipe.teacher.model}")
        fit_classifier(student, task_of(recipe.task), f"student {run.student}")
    depths = recipe.student.layers, teacher.config.num_hidden_layers
    layers = make_layer_map(recipe.layer_map, *depths, seed=recipe.train.seed)
    traits = try_for(student, recipe), try_for(teacher, recipe)
    objective = make_objective(
        recipe.losses,
        layers,
        student,
        teacher,
        traits,
        head=recipe.student.head,
        seed=recipe.train.seed,
        steps=steps,
    )
    load_projections(objective, run)
    datamodule = make_datamodule(recipe, tokenizer, teacher.config, ranks, progress=False)
    if HEADS[recipe.student.head].data == "task":
        pad_alike(datamodule, tokenizer, teacher, student)
    module = DistilledStudent(student, objective).to(ranks.device).eval()
    runner = TeacherRunner(teacher, recipe, objective, ranks)
    size = plan_batches(recipe, ranks.world_size).micro_batch_size
    return evaluate(module, module.student, runner, objective, datamodule, size, ranks)


def check_overrides(overrides: Sequence[str]) -> None:
    """See that overrides leave what a run made as it is.

    Raises:
        UserError: one that would describe another student than the run's.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not any(f"{key}.".startswith(f"{allowed}.") for allowed in _REPLACEABLE):
            raise UserError(
                f"override {override!r}: the run is made, so an evaluation takes values of "
                f"{', '.join(_REPLACEABLE)} alone"
            )


def _evaluate_tuned(run: RunFolder, recipe: FinetuneRecipe, steps: int, ranks: Ranks) -> Evaluation:
    """Evaluate a fine-tuned model on its task."""
    source = {"name": str(run.student), "revision": None, "sha256": None}
    section = recipe.model.model_copy(update=source)
    tuned = load_tuned(section, task_of(recipe.task))
    if tuned.new_head:
        raise UserError(f"{run.student} holds no head for task {recipe.task.name}; tune it again")
    model = tuned.model
    tokenizer = load_tokenizer(section.source, vocabulary_size(model))
    datamodule = make_datamodule(recipe, tokenizer, model.config, ranks, progress=False)
    assert isinstance(datamodule, TaskDataModule), "a fine-tuning recipe has a task"
    pad_alike(datamodule, tokenizer, model)
    objective, _ = hard_objective(model, steps)
    module = DistilledStudent(model, objective).to(ranks.device).eval()
    size = plan_batches(recipe, ranks.world_size).micro_batch_size
    return evaluate(module, model, NoTeacher(), objective, datamodule, size, ranks)


def tokens_per_second(run: Callable[[Inputs], object], inputs: Inputs, ranks: Ranks) -> float:
    """Forward throughput of one rank: the median of five passes after a warm-up."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            _synchronise(ranks)
            start = time.perf_counter()
            run(inputs)
            _synchronise(ranks)
            times.append(time.perf_counter() - start)
    mask = inputs.get("attention_mask")
    tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
    return tokens / sorted(times[1:])[2]


def peak_memory(ranks: Ranks) -> int:
    """Peak bytes of this rank so far: of the GPU where there is one, else of the process."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def move(inputs: Inputs, ranks: Ranks) -> Inputs:
    """Inputs on a rank's device."""
    return {name: tensor.to(ranks.device) for name, tensor in inputs.items()}


def _synchronise(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
