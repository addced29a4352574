"""From a recipe to a run: its parts, and what they stand in.

Everything that can be wrong with a recipe on this machine is found here, before the first step.
There are three ways to stand: a run that trains (`set_up`: a DeepSpeed engine), one that is tried
before its turn (`set_up_trial`), and one that is finished (`set_up_evaluation`); the last two train
nothing, so their student stands in no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.capture import Capture, CompiledCapture
from fastkd.capture.compiled import check_compiler
from fastkd.data.batching import BatchPlan, plan_batches
from fastkd.data.datamodule import MicroBatches
from fastkd.distributed import Ranks
from fastkd.errors import FOREIGN_ERRORS, UserError
from fastkd.losses.gathering import Gather, alone
from fastkd.losses.pooling import EmbeddingModules
from fastkd.models.quantised import quantise
from fastkd.packed_row import valid_tokens
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.seeds import derived_seed
from fastkd.training.ahead import TeacherAhead, check_overlap
from fastkd.training.deepspeed_config import check_packages, deepspeed_of_student, uses_deepspeed
from fastkd.training.engine import (
    check_config,
    make_engine,
    refusal,
    shard_teacher,
    whole_weights,
)
from fastkd.training.gather import gather
from fastkd.training.gathering import check_gathering, step_gathers
from fastkd.training.graphs import GraphedStep, Record, check_graphs
from fastkd.training.local_engine import LocalEngine
from fastkd.training.memory import apart, check_micro_batch, memory_parts
from fastkd.training.optimizer import matrix_numbers
from fastkd.training.parts import Parts
from fastkd.training.precision import settle_precision
from fastkd.training.profile import NoProfile, Profile, clocks_of
from fastkd.training.run_folder import RunFolder
from fastkd.training.sharded import whole_numbers
from fastkd.training.step_memory import StepMemory
from fastkd.training.teacher import NoTeacher, TeacherRunner
from fastkd.types import LENGTHS, ROWS, STORED, Inputs, Side, teacher_inputs


@dataclass
class Run(Parts):
    """A run on one rank: its parts, with the models where they work."""

    teacher: TeacherRunner | NoTeacher
    engine: Any
    """Around `module`, see `make_engine`; `module` itself where nothing is trained."""
    graphed: GraphedStep | None = None
    """What makes a micro-batch's forward and backward, where that is recorded."""
    ahead: TeacherAhead | None = None
    """What runs the teacher beside the student."""
    profile: Profile | NoProfile = field(default_factory=NoProfile)
    """What is told of the phases of a step."""

    @property
    def student(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What to call on a micro-batch: DeepSpeed's engine, which has to see it, else `module`."""
        return self.module if isinstance(self.engine, LocalEngine) else self.engine

    def teacher_states(self, batches: Iterable[Inputs]) -> Iterator[Capture]:
        """What the teacher leaves of each micro-batch of a step, made as it is asked for."""
        return map(self.teacher, batches) if self.ahead is None else self.ahead(batches)

    @property
    def teacher_parameters(self) -> int:
        """Numbers in the teacher, or all of them, poolers left out; 0 without one."""
        return whole_numbers(self._teacher_weights())

    @property
    def first_teacher_parameters(self) -> int:
        """Numbers in the first of several teachers, see `teacher_parameters`."""
        others = chain.from_iterable(other.model.parameters() for other in self.others)
        return self.teacher_parameters - whole_numbers(others)

    @property
    def teacher_bytes(self) -> int:
        """Bytes of `teacher_parameters`, on all ranks together where they are sharded."""
        weights = self._teacher_weights()
        return sum(whole_numbers([weight]) * weight.element_size() for weight in weights)

    def _teacher_weights(self) -> Iterator[nn.Parameter]:
        """Weights of all teachers."""
        first = [] if self.teacher_model is None else [self.teacher_model]
        for model in (*first, *(other.model for other in self.others)):
            yield from model.parameters()

    def computed_parts(self) -> dict[str, int]:
        """Bytes of weights, gradients and moments on this rank's device, see `memory_parts`."""
        weights = list(self.module.parameters())
        trained, frozen = (
            whole_numbers(p for p in weights if p.requires_grad == trains)
            for trains in (True, False)
        )
        world = self.ranks.world_size
        matrices = matrix_numbers(self.module.student, self.recipe.train)
        parts = memory_parts(self.recipe, self.teacher_bytes, trained, world, matrices, frozen)
        device, machine = apart(self.recipe, parts, self.plan)
        if self.ranks.device.type == "cuda":
            return device
        return {name: device.get(name, 0) + machine.get(name, 0) for name in parts}

    def micro_batches(self) -> MicroBatches:
        """What this rank trains on, from the first step; every rank calls this."""
        train = self.recipe.train
        micro_batches = self.datamodule.micro_batches(
            train.batch_size, train.order, self.plan, self.ranks.rank
        )
        stored = self.teacher.stored if isinstance(self.teacher, TeacherRunner) else None
        if stored is None:
            return micro_batches
        return stored.reading(micro_batches, partial(self.objective.layers, "teacher"))

    def embedding(self, side: Side) -> EmbeddingModules | None:
        """What makes a model's embeddings of its final states, as its user gets them, with the
        student's projection as it is now; `None` where fastkd doesn't know the teacher's modules.
        Collective under ZeRO-3."""
        with whole_weights(self.engine, self.objective.parameters()):
            return self.objective.embedding(side)

    def embed(self, side: Side, inputs: Inputs) -> Tensor:
        """Embeddings of a micro-batch, as `SentenceTransformer.encode` gives them of the model's
        folder; of the student's once it is exported. Collective under ZeRO-3.

        Args:
            side: whose; of several teachers it is what their embeddings come to.
            inputs: on this rank's device.

        Returns:
            [batch, dim], fp32, without gradient.

        Raises:
            UserError: the teacher has modules that fastkd doesn't know, or is none.
        """
        if side == "teacher" and self.others:
            found = self.teacher(inputs, whole=True).embedding
            if found is not None:
                return found
        modules = self.embedding(side)
        if modules is None or (side == "teacher" and isinstance(self.teacher, NoTeacher)):
            raise UserError(
                f"the {side} gives no embeddings: there is no teacher, or fastkd doesn't know its "
                "modules of sentence-transformers"
            )
        with torch.no_grad():
            if side == "student":
                states = self.student(inputs)[0]
            else:
                assert isinstance(self.teacher, TeacherRunner), "it was looked at above"
                states = self.teacher.embed(inputs)
            read = inputs if side == "student" else teacher_inputs(inputs)
            made: Tensor = modules(states, valid_tokens(read))
        return made

    def move(self, inputs: Inputs) -> Inputs:
        """Inputs on this rank's device, without the numbers of their rows; lengths are read on the
        host, and stored states of the teacher stay where they are until they are used."""
        device = self.ranks.device
        return {
            name: tensor
            if name == LENGTHS or name.startswith(STORED)
            else tensor.to(device, non_blocking=True)
            for name, tensor in inputs.items()
            if name != ROWS
        }

    def loss_scales(self, batches: list[Inputs]) -> Tensor:
        """What each micro-batch of a step counts among all, fp32 [micro-batches, DIVISORS].

        The engine averages over ranks and micro-batches, where the losses should add up.
        """
        counts = torch.stack([self.objective.divisors(batch) for batch in batches])
        shares = counts / self.ranks.sum(counts.sum(dim=0)).clamp(min=1)
        return (shares * self.plan.pieces).float()

    def gathers(self, batches: Sequence[Inputs], loss_scales: Tensor) -> Sequence[Gather]:
        """What gives the losses of each micro-batch of a step the rows of all of it, for one pass
        over them in order; without losses that compare rows it does nothing."""
        if not self.objective.least_rows or self.plan.pieces == 1:
            return [alone] * len(batches)
        return step_gathers(self.ranks, len(batches), partial(self._read, batches, loss_scales))

    def _read(
        self, batches: Sequence[Inputs], loss_scales: Tensor, gathers: Sequence[Gather]
    ) -> None:
        """Let the losses see what they will see when these micro-batches are trained on: of the
        random numbers that dropout draws, the same come again."""
        device, phase = self.ranks.device, self.profile.phase
        teacher_states = self.teacher_states(batches)
        # without gradients a compiled model is another graph, which may draw other numbers
        grad = self.module.compiled is not None and torch.is_grad_enabled()
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.set_grad_enabled(grad):
            for batch, scale, gather in zip(batches, loss_scales, gathers, strict=True):
                with phase("teacher"):
                    states = next(teacher_states)
                with phase("student"):
                    self.student(batch, states, scale, gather)


def set_up(recipe: AnyRecipe, ranks: Ranks, *, progress: bool = True) -> Run:
    """Set a run up that trains; collective over the ranks.

    Args:
        recipe: what to build.
        ranks: from `start_ranks`.
        progress: whether reading data shows bars.

    Raises:
        UserError: anything about the recipe that does not work on this machine.
    """
    check_packages(recipe)
    parts = _gathered(recipe, ranks, progress)
    teacher = _teacher(parts, sharded=True)
    # what transformers reads is in eval mode, and a continued run starts with a step
    try:
        engine = make_engine(parts.module.train(), parts.recipe, parts.plan, ranks)
    except FOREIGN_ERRORS as error:
        if isinstance(error, UserError) or not recipe.deepspeed:
            raise
        raise UserError(refusal(error)) from error
    # dropout must differ between ranks; everything before must not
    dropping = recipe.train.dropping
    torch.manual_seed(derived_seed(dropping, ranks.rank) if ranks.rank else dropping + 1)
    run = Run(**vars(parts), teacher=teacher, engine=engine)
    if recipe.train.compile:
        _compile(run)
    if recipe.train.cuda_graph:
        run.graphed = graphed_step(run)
    if isinstance(recipe, Recipe) and recipe.teacher.overlap:
        assert isinstance(teacher, TeacherRunner), "a distillation has one"
        run.ahead = TeacherAhead(teacher, ranks.device)
    if recipe.train.profile:
        run.profile = make_profile(run)
    return run


def make_profile(run: Run) -> Profile:
    """What measures the steps of a run from now on, once for a run."""
    device, memory = run.ranks.device, None
    # its hooks would be recorded, and called no more
    if run.graphed is None:
        memory = StepMemory(
            run.module,
            run.teacher_model,
            run.engine,
            device,
            run.computed_parts(),
            captured=1 if run.ahead is None else 2,
        )
    return Profile(clocks_of(device), run.objective, memory)


def set_up_trial(recipe: Recipe, ranks: Ranks, *, progress: bool = True) -> Run:
    """Set a run up whose losses are to be tried and that trains later, if at all, see `set_up`."""
    # a sharded teacher may not fit on one device: both are tried where they were loaded
    if recipe.teacher.placement != "replicate":
        ranks = replace(ranks, device=torch.device("cpu"))
    return _still(_gathered(recipe, ranks, progress), sharded=False)


def set_up_evaluation(recipe: AnyRecipe, made: RunFolder, ranks: Ranks) -> Run:
    """Set a run up that is finished: its student and projections are those that it exported.

    Args:
        recipe: of the run, with its number of steps.
        made: where it was written.
        ranks: from `start_ranks`.

    Raises:
        UserError: as `set_up`.
    """
    plan = plan_batches(recipe, ranks.world_size)
    parts = gather(recipe, plan, ranks, progress=False, made=made)
    check_gathering(parts.objective, plan, recorded=False)
    return _still(parts, sharded=True)


def check_layout(recipe: AnyRecipe, plan: BatchPlan, device: torch.device) -> None:
    """See that steps can be made as a recipe says on devices of a kind, before anything is read.

    Raises:
        UserError: they can't be recorded in a graph or overlap, or DeepSpeed doesn't take the
            section.
    """
    by_deepspeed = uses_deepspeed(recipe, plan.world_size)
    if recipe.train.cuda_graph:
        model = recipe.student if isinstance(recipe, Recipe) else recipe.model
        recomputes = model.gradient_checkpointing and not recipe.train.compile
        check_graphs(device, by_deepspeed=by_deepspeed, recomputes=recomputes)
    if isinstance(recipe, Recipe) and recipe.teacher.overlap:
        check_overlap(device, plan.accumulation)
    if by_deepspeed:
        check_config(deepspeed_of_student(recipe, plan))


def _gathered(recipe: AnyRecipe, ranks: Ranks, progress: bool) -> Parts:
    """The parts of a run that is to be made, once all is checked that can be without them."""
    recipe = settle_precision(recipe, ranks)
    plan = plan_batches(recipe, ranks.world_size)
    if recipe.train.compile:
        check_compiler(ranks.device)
    check_layout(recipe, plan, ranks.device)
    check_micro_batch(recipe, plan.micro_batch_size, ranks.device)
    torch.manual_seed(recipe.train.seed)
    parts = gather(recipe, plan, ranks, progress=progress)
    check_gathering(parts.objective, plan, recorded=recipe.train.cuda_graph)
    return parts


def _still(parts: Parts, *, sharded: bool) -> Run:
    module = parts.module.to(parts.ranks.device).eval()
    return Run(**vars(parts), teacher=_teacher(parts, sharded=sharded), engine=module)


def _teacher(parts: Parts, *, sharded: bool) -> TeacherRunner | NoTeacher:
    """The teacher where the recipe places it; whole, where it should not be sharded."""
    model, recipe = parts.teacher_model, parts.recipe
    if model is None or not isinstance(recipe, Recipe):
        return NoTeacher()
    if sharded and recipe.teacher.placement != "replicate":
        return TeacherRunner(model, parts.objective, shard_teacher(model, recipe))
    device, kind = parts.ranks.device, recipe.teacher.eight_bits
    if kind is None:
        for other in parts.others:
            other.model.to(device)
        return TeacherRunner(model.to(device), parts.objective, others=parts.others)
    # only now: the student was made of its weights
    quantised = quantise(model, kind, device)
    return TeacherRunner(model, parts.objective, quantised=quantised)


def graphed_step(run: Run, record: Record | None = None) -> GraphedStep:
    """A run's forward and backward of a micro-batch, recorded; `record` as of `GraphedStep`."""
    engine, teacher = run.engine, run.teacher
    engine.hold_gradients()

    def step(inputs: Inputs, scale: Tensor) -> Tensor:
        loss, parts = run.module(inputs, teacher(inputs), scale)
        engine.differentiate(loss)
        added: Tensor = parts
        return added

    return GraphedStep(step, run.objective, engine.trained, record)


def _compile(run: Run) -> None:
    """Let both models be compiled where they train; an evaluation of the run reads them eagerly."""
    objective = run.objective
    student = CompiledCapture(run.module.student, objective.all_layers("student"))
    run.module.compiled = student.open()
    if isinstance(run.teacher, TeacherRunner):
        teacher = CompiledCapture(run.teacher.model, objective.all_layers("teacher"))
        run.teacher.compiled = teacher.open()
