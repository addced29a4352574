"""What a recipe needs on GPUs that are not here: memory by part, and bounds on its speed.

Models are built without numbers, from their configurations alone, and run once (`dry_pass`). Memory
follows from their parameters, the ZeRO stage, the precision and what the pass leaves; time from its
matrix products at a share of the chip's rate, and from the bytes that have to move between ranks or
from the memory of the machine while they are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture import AttentionTraits, find_blocks
from fastkd.data.batching import BatchPlan, plan_batches
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.layer_map import LayerMap
from fastkd.losses.factory import make_objective
from fastkd.losses.objective import Objective
from fastkd.models.load import read_config
from fastkd.models.locate import locate_model
from fastkd.models.quantised import replace_linear
from fastkd.recipe import Recipe, parse_recipe, sequence_limit
from fastkd.training.chips import Chip
from fastkd.training.deepspeed_config import deepspeed_of_student, uses_deepspeed
from fastkd.training.dry_pass import DryPass, bytes_of, dry_pass, tensors_of
from fastkd.training.embeddings import find_embeddings, handed_on_prompts
from fastkd.training.engine import check_config
from fastkd.training.memory import apart, is_offloaded, memory_parts
from fastkd.training.moving import host_bytes, link_bytes, reduced_bytes
from fastkd.training.optimizer import matrix_numbers
from fastkd.training.outlines import outlined
from fastkd.training.unrounded import is_rounded
from fastkd.types import EightBits

EFFICIENCY = 0.4
"""Assumed: what matrix products of whole models reach of a chip's rate."""
NODE, NETWORK = 8, 50e9
"""Assumed: GPUs of a machine, and bytes a second between machines for each (400 Gb/s)."""
LIBRARIES = 2 * 2**30
"""Assumed: bytes that CUDA, NCCL and the allocator's gaps take."""

# DeepSpeed's own number of elements, by which it fetches a teacher ahead
_PREFETCH = 50_000_000
# a backward pass has two products for one, flash attention's five for two as it makes maps again
_BACKWARD, _ATTENTION_BACKWARD = 2.0, 2.5
# of the products a dense model is known to make
_COUNTED = 0.9


@dataclass(frozen=True)
class Passes:
    """Both models of a recipe, run once on one micro-batch."""

    teacher: DryPass
    student: DryPass
    teacher_numbers: int
    teacher_bytes: int
    trained_numbers: int
    frozen_numbers: int
    """Further parameters of the student, which are not trained."""
    matrix_numbers: int
    """Trained parameters that Muon updates."""
    teacher_block: int
    """Numbers of the largest module that ZeRO-3 gathers at a time."""
    student_block: int
    rows: int
    tokens: int
    """Tokens of a row."""
    least_rows: int = 1
    """Rows of a micro-batch at least; more than one where losses compare rows with each other."""
    read_twice: bool = False
    """Whether the student is made from the teacher's numbers in fp32, which are read beside it."""

    def readings(self, plan: BatchPlan) -> int:
        """Forward passes of both models over a micro-batch, see `fastkd.training.gathering`."""
        return 2 if self.least_rows > 1 and plan.accumulation > 1 else 1


@dataclass(frozen=True)
class Forecast:
    """What one GPU holds and does."""

    parts: dict[str, int]
    """Bytes on the GPU."""
    machine: int
    """Bytes of this rank in the memory of the machine."""
    loading: int
    """Bytes of this rank there before: wherever it is placed, a rank loads the whole teacher."""
    computing: float
    """Seconds that matrix products of a step take, at `EFFICIENCY`."""
    moving: float
    """Seconds that weights and gradients of a step take to move."""
    tokens: int
    """Tokens of a step, all ranks together."""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.parts.values())

    @property
    def speed(self) -> float:
        """Tokens a second of all ranks, where moving hides behind computing."""
        return self.tokens / max(self.computing, self.moving)


def run_dry(recipe: Recipe, rows: int) -> Passes:
    """Build the models of a recipe without numbers and run them on a micro-batch.

    Args:
        recipe: whose teacher needs a configuration, but no weights.
        rows: of the micro-batch.

    Raises:
        UserError: a model that can't be run so.
    """
    if recipe.teacher.others:
        raise UserError(
            "teacher.others are given, but --gpu forecasts one teacher; leave --gpu out, which "
            "makes a few real steps"
        )
    row, tokens = _sequences(recipe), sequence_limit(recipe)
    sequences = rows * max(1, len(row))
    source = recipe.teacher.source
    given, started = f"teacher.model {source.name}", f"student.init {recipe.student.init}"
    config = read_config(locate_model(source.name), given, source.revision)
    read_twice = is_rounded(recipe, config)
    with _without_numbers(given, config), torch.device("meta"):
        teacher, student, layers = outlined(recipe, config)
        inputs = {"input_ids": torch.zeros(sequences, tokens, dtype=torch.long)}
        seen = dry_pass(teacher, inputs, {}).traits
        with _without_numbers(started, student.config):
            traits = dry_pass(student, inputs, {}).traits, seen
        objective = _objective(recipe, config, layers, student, teacher, traits)
        if recipe.teacher.eight_bits is not None:
            replace_linear(teacher, recipe.teacher.eight_bits)
    depth = objective.teacher_depth
    with _without_numbers(given, config):
        read, eager = objective.layers("teacher"), recipe.teacher.attention == "eager"
        taught = dry_pass(teacher, inputs, read, depth=depth, eager=eager)
    with _without_numbers(started, student.config):
        read, eager = objective.layers("student"), recipe.student.attention == "eager"
        learnt = dry_pass(student, inputs, read, train=True, eager=eager)
    _check_counted(given, find_blocks(teacher)[:depth], taught, sequences * tokens)
    _check_counted(started, find_blocks(student), learnt, sequences * tokens)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    return Passes(
        teacher=taught,
        student=learnt,
        teacher_numbers=_numbers(teacher),
        teacher_bytes=sum(p.numel() * p.element_size() for p in teacher.parameters()),
        trained_numbers=_numbers(student) - frozen + _numbers(objective),
        frozen_numbers=frozen,
        matrix_numbers=matrix_numbers(student, recipe.train),
        teacher_block=_largest(teacher),
        student_block=_largest(student),
        rows=rows,
        tokens=tokens * max(1, len(row)),
        least_rows=max(objective.least_rows.values(), default=1),
        read_twice=read_twice,
    )


def _sequences(recipe: Recipe) -> tuple[str, ...]:
    """Names of the sequences that a row has beside each other, if any."""
    form = recipe.row_form
    return () if form is None else form.sequences


def _objective(
    recipe: Recipe,
    config: Any,
    layers: LayerMap,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    traits: tuple[AttentionTraits, AttentionTraits],
) -> Objective:
    """The objective of the recipe's losses, refused where a run would refuse it."""
    handed_on_prompts(recipe)
    return make_objective(
        recipe.losses,
        layers,
        student,
        teacher,
        traits,
        head=recipe.student.head,
        embeddings=find_embeddings(recipe, config, student.config),
        row=_sequences(recipe),
    )


def forecast(recipe: Recipe, passes: Passes, chip: Chip, ranks: int) -> Forecast:
    """What a recipe needs on each of some GPUs.

    Args:
        recipe: precision, stage, placement and micro-batch.
        passes: from `run_dry`, of a micro-batch of any size: bytes and operations grow with it.
        chip: one of them.
        ranks: how many.

    Raises:
        UserError: the batch doesn't divide by them, they don't multiply what the teacher is
            rounded to, or the `deepspeed` section is none that a run takes.
    """
    _check_multiplied(recipe.teacher.eight_bits, chip)
    plan = plan_batches(recipe, ranks)
    times = plan.micro_batch_size / passes.rows
    kept = memory_parts(
        recipe,
        passes.teacher_bytes,
        passes.trained_numbers,
        ranks,
        matrices=passes.matrix_numbers,
        frozen=passes.frozen_numbers,
    )
    parts, machine = apart(recipe, kept, plan)
    parts |= _worked_with(recipe, passes, plan)
    return Forecast(
        parts=parts,
        machine=sum(machine.values()),
        loading=passes.teacher_numbers * (recipe.teacher.number_bytes + 4 * passes.read_twice),
        computing=_operations_seconds(recipe, passes, chip, plan) * times * plan.accumulation,
        moving=_moving_seconds(recipe, passes, chip, plan),
        tokens=recipe.train.batch_size * passes.tokens,
    )


def layouts(recipe: Recipe, ranks: int) -> Iterator[tuple[str, Recipe]]:
    """Ways to lay the same run out that need less memory, the cheapest first, as overrides."""
    rows = plan_batches(recipe, ranks).micro_batch_size
    budgeted = recipe.data is not None and recipe.data.batch_tokens is not None
    places: list[tuple[str, dict[str, str]]] = [("", {})]
    given = recipe.teacher
    # a recipe refuses these with what needs the teacher whole
    whole = recipe.train.compile or given.overlap or given.cache != "none"
    if not whole and given.eight_bits is None:
        if ranks > 1:
            places += [("teacher.placement=shard", {"placement": "shard"})]
        places += [("teacher.placement=offload", {"placement": "offload"})]
    stages = [recipe.train.zero_stage, *([2, 3] if ranks > 1 else [])]
    for place, teacher in places:
        for stage in sorted({stage for stage in stages if stage >= recipe.train.zero_stage}):
            size = rows
            while size:
                said = [place] if teacher else []
                said += [f"train.zero_stage={stage}"] * (stage != recipe.train.zero_stage)
                train: dict[str, int] = {"zero_stage": stage}
                changed: dict[str, Any] = {"teacher": recipe.teacher.model_copy(update=teacher)}
                if budgeted and recipe.data is not None:
                    budget = size * (recipe.row_tokens or 0)
                    said += [f"data.batch_tokens={budget}"] * (size != rows)
                    changed["data"] = recipe.data.model_copy(update={"batch_tokens": budget})
                else:
                    said += [f"train.micro_batch_size={size}"] * (size != rows)
                    train["micro_batch_size"] = size
                changed["train"] = recipe.train.model_copy(update=train)
                if said and _is_taken(made := recipe.model_copy(update=changed)):
                    yield " ".join(said), made
                size = size // 2 if size % 2 == 0 else 0


def _is_taken(recipe: Recipe) -> bool:
    """Whether a recipe that was changed is one that can be given."""
    try:
        parse_recipe(recipe.model_dump(mode="json", exclude_none=True))
    except UserError:
        return False
    return True


@contextmanager
def _without_numbers(given: str, config: Any) -> Iterator[None]:
    """Say which model can't run so."""
    try:
        yield
    except FOREIGN_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{given}: --gpu can't run a {type(config).__name__} model without its numbers "
            f"({one_line(error)}); leave --gpu out, which makes a few real steps"
        ) from error


def _numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _largest(model: PreTrainedModel) -> int:
    modules = list(model.modules())
    sizes: list[int] = [sum(p.numel() for p in m.parameters(recurse=False)) for m in modules]
    return max(sizes + [_numbers(block) for block in find_blocks(model)])


def _check_counted(given: str, blocks: Iterable[nn.Module], found: DryPass, tokens: int) -> None:
    """See that a pass has multiplied by what its blocks hold."""
    matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim > 1)
    share = found.products / max(1, 2 * tokens * matrices)
    if share < _COUNTED:
        raise UserError(
            f"{given}: {share:.0%} of its weights were found at work in a pass, expected all of a "
            "dense model; --gpu can't forecast a mixture of experts: leave it out, which makes a "
            "few real steps"
        )


def _check_multiplied(kind: EightBits | None, chip: Chip) -> None:
    if kind == "int8":
        raise UserError("teacher.dtype is int8, which CPUs multiply; give float8 or bfloat16")
    if kind == "float8" and chip.float8 is None:
        raise UserError(
            f"teacher.dtype is float8, which an {chip.label} does not multiply; give bfloat16"
        )


def _worked_with(recipe: Recipe, passes: Passes, plan: BatchPlan) -> dict[str, int]:
    """Bytes that come and go within a step."""
    train, sizes = recipe.train, recipe.train.number_bytes
    times, config = plan.micro_batch_size / passes.rows, _config_of(recipe, plan)
    zero = config and config.zero_config
    student = tensors_of(passes.student.captured)
    # what is rounded to a byte is divided in fp32 before
    at_work = 3 if recipe.teacher.eight_bits is None else 4
    # beside those that the student is compared with
    captured = bytes_of(tensors_of(passes.teacher.captured)) * (1 + recipe.teacher.overlap)
    parts = {
        # the losses form the gradients of what is compared as they read it
        "activations": int((passes.student.saved + bytes_of(student)) * times),
        "captured of the teacher": int(captured * times),
        "the teacher at work": int(at_work * passes.teacher.largest * times),
    }
    added_at_once = zero and (train.zero_stage > 1 or is_offloaded(recipe))
    if train.precision == "bf16" and not added_at_once:
        # beside the sum in fp32; one process keeps a micro-batch's own until it has added it
        each = 2 if zero or plan.accumulation == 1 else 6
        parts["gradients of a micro-batch"] = each * passes.trained_numbers
    gathered = 0
    if recipe.teacher.placement != "replicate":
        most = passes.teacher_block + _PREFETCH
        gathered += recipe.teacher.number_bytes * min(passes.teacher_numbers, most)
    if zero and train.zero_stage == 3:
        # torch's linear layers hold theirs from forward to backward
        goes = recipe.student.gradient_checkpointing or zero.memory_efficient_linear
        ahead = passes.student_block + zero.prefetch_bucket_size
        most = ahead if goes else passes.trained_numbers
        gathered += sizes * min(passes.trained_numbers, most)
    if gathered:
        parts["weights gathered at a time"] = gathered
    bucket = _bucket(recipe, config)
    if bucket:
        parts["bucket of gradients"] = bucket
    return {**parts, "CUDA and NCCL, assumed": LIBRARIES}


def _bucket(recipe: Recipe, config: Any) -> int:
    """Bytes in which DeepSpeed gathers gradients until they are reduced."""
    train = recipe.train
    if config is None or train.zero_stage == 0:
        return 0
    zero, offloaded = config.zero_config, is_offloaded(recipe)
    if not (zero.contiguous_gradients or (offloaded and train.zero_stage < 3)):
        return 0
    if train.zero_stage == 3:
        return int(reduced_bytes(config) * zero.reduce_bucket_size)
    if train.zero_stage == 1:
        # in bf16 it has an optimiser that needs none, and no place for an offloaded one
        each = 0 if train.precision == "bf16" and not offloaded else 4
    else:
        each = train.number_bytes
    # one is filled while the other is reduced
    return int(each * zero.reduce_bucket_size * (1 + zero.overlap_comm))


def _config_of(recipe: Recipe, plan: BatchPlan) -> Any:
    """What DeepSpeed reads of its section, its defaults with them; `None` without its engine.

    Raises:
        UserError: a run would refuse the `deepspeed` section.
    """
    if not uses_deepspeed(recipe, plan.world_size):
        return None
    return check_config(deepspeed_of_student(recipe, plan))


def _operations_seconds(recipe: Recipe, passes: Passes, chip: Chip, plan: BatchPlan) -> float:
    """Seconds of both models' passes over one micro-batch."""
    teacher, student, forward = passes.teacher, passes.student, passes.readings(plan)
    single = chip.tf32 if recipe.train.tf32 else chip.single
    # kernels of the losses multiply fp32 as three products of TF32, whatever the recipe says
    exact, rounded = (single, chip.tf32 / 3), (chip.half, chip.half)
    rate, of_head = exact if recipe.teacher.states == "float32" else rounded
    teaching = teacher.products - teacher.float8 + teacher.attention
    seconds = teaching / rate + _head(teacher) / of_head
    if teacher.float8:
        assert chip.float8 is not None, "others are refused"
        seconds += teacher.float8 / chip.float8
    seconds *= forward
    again = 1.0 if recipe.student.gradient_checkpointing else 0.0
    learning = (forward + _BACKWARD + again) * student.products
    backward = _BACKWARD if recipe.student.attention == "eager" else _ATTENTION_BACKWARD
    learning += (forward + backward + again) * student.attention
    rate, of_head = rounded if recipe.train.precision == "bf16" else exact
    # checkpointing makes blocks again, but no head
    seconds += learning / rate + (forward + _BACKWARD) * _head(student) / of_head
    return seconds / EFFICIENCY


def _head(found: DryPass) -> int:
    """Operations of a head that the losses multiply by."""
    logits = found.captured.logits
    if logits is None or isinstance(logits, Tensor):
        return 0
    rows = logits.hidden.numel() // logits.hidden.shape[-1]
    operations: int = 2 * rows * logits.weight.numel()
    return operations


def _moving_seconds(recipe: Recipe, passes: Passes, chip: Chip, plan: BatchPlan) -> float:
    """Seconds that a rank receives or reads weights and gradients for in a step."""
    ranks, readings = plan.world_size, passes.readings(plan)
    link = chip.link if ranks <= NODE else min(chip.link, NETWORK)
    trained, frozen = passes.trained_numbers, passes.frozen_numbers
    seconds = host_bytes(recipe, plan, trained, frozen, readings) / chip.host
    config = _config_of(recipe, plan)
    if config is not None:
        seconds += link_bytes(recipe, config, plan, trained, frozen, readings) / link
    passed = plan.accumulation * readings
    teacher = passes.teacher_numbers * recipe.teacher.number_bytes
    if recipe.teacher.placement != "replicate":
        seconds += teacher * (ranks - 1) / ranks * passed / link
    if recipe.teacher.placement == "offload":
        seconds += teacher / ranks * passed / chip.host
    return seconds
