"""One process group, one engine for everything that trains, the teacher apart from it.

Among several ranks the engine is DeepSpeed's, on one it is a `LocalEngine`. Its module holds the
student and the projections; its `forward` captures, computes the losses and returns them, which is
the only form that is right under ZeRO-3 (parameters are whole only inside the forward of the module
that owns them). The teacher is a plain frozen module on every rank, or a second ZeRO-3 engine
without an optimiser.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from fastkd.capture import Capture, CompiledCapture, at_depth, capture, reading
from fastkd.capture.blocks import find_blocks
from fastkd.capture.lm_head import last_hidden_state, last_layer
from fastkd.data.batching import BatchPlan
from fastkd.data.datamodule import MicroBatches
from fastkd.distributed import Ranks
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.layer_map import Progress
from fastkd.losses.objective import DistilledStudent, Objective
from fastkd.losses.pooling import EmbeddingModules
from fastkd.models.half import check_rounding, round_buffers
from fastkd.models.quantised import Quantised
from fastkd.packed_row import valid_tokens
from fastkd.recipe import AnyRecipe, Recipe, Train
from fastkd.training.checkpoint.layout import find_places
from fastkd.training.deepspeed_config import (
    deepspeed_of_student,
    deepspeed_of_teacher,
    uses_deepspeed,
)
from fastkd.training.local_engine import LocalEngine
from fastkd.training.muon import Muon, Piece, block_matrices, is_bias
from fastkd.types import STORED, Inputs, teacher_inputs

Wanted = Mapping[str, Any]
"""Keyword arguments of `capture`."""


class StoredStates(Protocol):
    """States of a teacher by row, from a disk, in the place of a teacher that runs."""

    heldout: bool
    """Whether they are also of held-out rows; else of those to train on alone."""
    has_scores: bool
    """Whether they hold what a head for a task gives."""

    def beside(self, inputs: Inputs, wanted: Wanted) -> Inputs:
        """A micro-batch that also holds what is stored of its rows.

        Args:
            inputs: with numbers of rows, on the CPU.
            wanted: keyword arguments of `capture`.
        """

    def reading(
        self, micro_batches: MicroBatches, wanted_at: Callable[[Progress], Wanted]
    ) -> MicroBatches:
        """Micro-batches that also hold what is stored of their rows.

        Args:
            micro_batches: with numbers of rows.
            wanted_at: what is wanted at a moment of the run; is called by whatever thread asks for
                a step.
        """

    def __call__(self, inputs: Inputs, wanted: Wanted) -> Capture:
        """What `capture` would have recorded of the teacher on a micro-batch that holds it."""


@dataclass(frozen=True)
class OtherTeacher:
    """A frozen teacher beside the first, which reads the same tokens."""

    model: PreTrainedModel
    modules: EmbeddingModules
    """What makes its embeddings."""

    def __call__(self, inputs: Inputs, first: Capture) -> Capture:
        """Its embedding and its scores, where those of the first teacher are there.

        Args:
            inputs: as the first teacher reads them.
            first: what was captured of that.
        """
        embeds, scores = first.embedding is not None, isinstance(first.logits, Tensor)
        recorded = capture(self.model, outputs=embeds, logits=scores)
        with torch.no_grad(), reading(self.model, inputs) as read, recorded as states:
            self.model(**read)
        made = None
        if states.outputs is not None:
            with torch.no_grad():
                made = self.modules(states.outputs, valid_tokens(inputs))
        return Capture(logits=states.logits, embedding=made)


class TeacherRunner:
    """A frozen teacher, called on a micro-batch for what the losses need of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        engine: nn.Module | None = None,
        *,
        quantised: Quantised | None = None,
        others: Sequence[OtherTeacher] = (),
    ) -> None:
        """Let a teacher run.

        Args:
            model: frozen, on the device where it runs.
            objective: whose layers are captured.
            engine: from `shard_teacher`, where the model is not whole.
            quantised: what of it is in eight bits.
            others: further teachers, on that device.
        """
        self.model = model
        self.objective = objective
        self.quantised = quantised
        self.others = tuple(others)
        self._run = model if engine is None else engine
        self._parts = tuple(self._run.modules())
        self._settle()
        self.compiled: CompiledCapture | None = None
        """What runs it while the objective is in training mode, where that is compiled."""
        self.stored: StoredStates | None = None
        """What gives its states of rows, where they are stored."""
        self._cut = self._find_cut()

    def __call__(self, inputs: Inputs, *, whole: bool = False) -> Capture:
        """Run as deep as the objective ever needs, or all of it, and return what is needed now."""
        if self.stored is not None and not whole and any(n.startswith(STORED) for n in inputs):
            return self.stored(inputs, self.objective.layers("teacher"))
        self._settle()
        wanted = self.objective.layers("teacher")
        cut = nullcontext() if whole else self._cut
        with torch.no_grad(), cut, reading(self.model, teacher_inputs(inputs)) as read:
            if self.compiled is not None and self.objective.training and not whole:
                states = self.compiled(read, wanted)
            else:
                with capture(self.model, **wanted) as states:
                    self._run(**read)
        return self._condensed(states, inputs)

    def _settle(self) -> None:
        """Put the teacher into eval mode, whatever a module that holds it was put into since."""
        if any(module.training for module in self._parts):
            # of DeepSpeed's engine it returns nothing
            self._run.eval()

    def record(self, inputs: Inputs, wanted: Wanted | None = None) -> Capture:
        """Run as deep as the objective ever needs, and return what it may ever need; or what is
        named, be it deeper."""
        wanted = self.objective.all_layers("teacher") if wanted is None else wanted
        depth = self.objective.teacher_depth
        deepest = max(wanted["attention"] | wanted["hidden"], default=0)
        cut = self._cut if depth is None or deepest <= depth else nullcontext()
        recorded = capture(self.model, **wanted)
        reads = reading(self.model, teacher_inputs(inputs))
        with torch.no_grad(), cut, reads as read, recorded as states:
            self._run(**read)
        return self._condensed(states, inputs)

    def _condensed(self, states: Capture, inputs: Inputs) -> Capture:
        """What the losses read of all teachers, once the first has run."""
        read, several = teacher_inputs(inputs), self.objective.pair.ensemble
        found = self.objective.condensed(states, valid_tokens(read))
        if several is None:
            return found
        return several(found, [other(read, found) for other in self.others])

    def embed(self, inputs: Inputs) -> Tensor:
        """The first teacher's last hidden state [batch, tokens, width], at full depth."""
        with torch.no_grad(), reading(self.model, teacher_inputs(inputs)) as read:
            return last_hidden_state(self._run, self.model, read)

    def _find_cut(self) -> AbstractContextManager[None]:
        full, depth = self.model.config.num_hidden_layers, self.objective.teacher_depth
        if depth is None or depth >= full:
            return nullcontext()
        return at_depth(self.model, max(depth, 1))


class NoTeacher:
    """In the place of a teacher where hard labels teach: it leaves nothing to be compared with."""

    def __call__(self, inputs: Inputs, *, whole: bool = False) -> Capture:
        return Capture()


def shard_teacher(model: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """A second ZeRO-3 engine, without an optimiser, that holds the teacher's weights in shards."""
    config, deepspeed = deepspeed_of_teacher(recipe), _deepspeed()
    # one weight at a time: of a model that is whole the engine puts all of it on each GPU first
    parts = deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(parts.local_device)
    engine: nn.Module = deepspeed.initialize(model=model, config=config)[0]
    return engine


def make_engine(module: DistilledStudent, recipe: AnyRecipe, plan: BatchPlan, ranks: Ranks) -> Any:
    """The engine around the module, with the optimiser and its schedule: DeepSpeed's, or a
    `LocalEngine`.

    Args:
        module: what trains.
        recipe: its sections `train` and `deepspeed`.
        plan: how a step is cut.
        ranks: this process among all.

    Raises:
        UserError: a parameter that DeepSpeed can't hand from rank to rank.
    """
    train = recipe.train
    for name, parameter in module.named_parameters():
        if not parameter.ndim:
            raise UserError(f"{name}: a parameter without dimensions; give it the shape [1]")
    optimizer = make_optimizer(module, train)
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=train.warmup_steps, num_training_steps=train.steps
    )
    if train.precision == "bf16":
        # either engine rounds the parameters
        round_buffers(module.student)
    module.to(ranks.device)
    if not uses_deepspeed(recipe, ranks.world_size):
        if train.precision == "bf16":
            check_rounding(module.student)
        return LocalEngine(
            module,
            optimizer,
            scheduler,
            accumulation=plan.accumulation,
            batch_size=train.batch_size,
            max_grad_norm=train.max_grad_norm,
            bf16=train.precision == "bf16",
            monitor=_monitor(deepspeed_of_student(recipe, plan))
            if recipe.run.monitor in ("tensorboard", "wandb")
            else None,
        )
    if train.zero_stage == 3:
        _lend_head(module)
    config = deepspeed_of_student(recipe, plan)
    engine, *_ = _deepspeed().initialize(
        model=module, optimizer=optimizer, lr_scheduler=scheduler, config=config
    )
    if isinstance(optimizer, Muon):
        optimizer.lie_flat(_flat_pieces(engine, ranks))
    return engine


def make_optimizer(module: DistilledStudent, train: Train) -> torch.optim.AdamW:
    """Fused AdamW, or `Muon` with it, over all of a module that trains."""
    groups = parameter_groups(module, train)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)
    matrices = block_matrices(find_blocks(module.student))
    return Muon(_with_matrices(groups, matrices), lr=train.learning_rate, betas=train.betas)


def matrix_numbers(student: PreTrainedModel, train: Train) -> int:
    """Numbers of a student that Muon updates."""
    if train.optimizer == "adamw":
        return 0
    return sum(matrix.numel() for matrix in block_matrices(find_blocks(student)))


def _with_matrices(
    groups: list[dict[str, Any]], matrices: set[nn.Parameter]
) -> list[dict[str, Any]]:
    """Groups of which the matrices stand apart."""
    apart = []
    for group in groups:
        for muon in (True, False):
            same = [p for p in group["params"] if (p in matrices) == muon]
            if same:
                apart.append({**group, "params": same, "muon": muon})
    return apart


def _flat_pieces(engine: Any, ranks: Ranks) -> dict[Tensor, list[Piece]]:
    """Where the matrices of the optimiser lie in the flat tensors of ZeRO 1 and 2."""
    of_ranks = [find_places(engine, rank) for rank in range(ranks.world_size)]
    pieces: dict[Tensor, list[Piece]] = defaultdict(list)
    for parameter, place in of_ranks[ranks.rank].items():
        if place.offset is not None:
            size = parameter.numel()
            shared = not any(places[parameter].holds(size) for places in of_ranks)
            piece = Piece(parameter.shape, place.start, place.length, place.offset, shared)
            pieces[place.master].append(piece)
    return pieces


def _monitor(config: dict[str, Any]) -> Any:
    """DeepSpeed's trackers, without its engine."""
    _deepspeed().init_distributed()
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    return MonitorMaster(get_monitor_config(config))


def _lend_head(module: DistilledStudent) -> None:
    """Let ZeRO-3 gather the weight of the student's last layer for the terms that multiply it.

    Its own module is not where it is used: what that module was given is handed to the objective.
    """
    layer = last_layer(module.student)
    if layer is None:
        return
    for term in module.objective.each():
        if term.layers("student").get("logits"):
            for parameter in layer.parameters():
                _deepspeed().zero.register_external_parameter(term, parameter)


def parameter_groups(module: nn.Module, train: Train) -> list[dict[str, Any]]:
    """Matrices with weight decay, biases and normalisation weights without; what has a learning
    rate of its own, such as a projection, in groups apart."""
    rates = {
        ".".join(filter(None, (prefix, name))): rate
        for prefix, part in module.named_modules()
        if isinstance(part, Objective)
        for name, rate in part.parameter_rates().items()
    }
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups = []
    for rate in (None, *sorted(set(rates.values()))):
        same = {name: p for name, p in trained.items() if rates.get(name) == rate}
        own = {} if rate is None else {"lr": rate}
        pulled = [p for name, p in same.items() if p.ndim > 1 and not is_bias(name)]
        free = [p for name, p in same.items() if p.ndim <= 1 or is_bias(name)]
        groups += [
            {"params": pulled, "weight_decay": train.weight_decay, **own},
            {"params": free, "weight_decay": 0.0, **own},
        ]
    return [group for group in groups if group["params"]]


def whole_weights(engine: Any, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Let parameters of what an engine trains be whole while the context is open; collective under
    ZeRO-3, and nothing elsewhere.

    Args:
        engine: from `make_engine`, or the module itself where nothing is trained.
        parameters: which.
    """
    if isinstance(engine, DistilledStudent) or engine.zero_optimization_stage() < 3:
        return nullcontext()
    # a parameter that a last prefetch left in flight would be skipped below, and read half-filled
    engine.empty_partition_cache()
    gathered: AbstractContextManager[Any] = _deepspeed().zero.GatheredParameters(list(parameters))
    return gathered


def check_config(config: dict[str, Any]) -> Any:
    """See that DeepSpeed takes a configuration, before anything is read or built.

    Returns:
        The `DeepSpeedConfig`: what it reads, with its defaults where nothing or `auto` is given.

    Raises:
        UserError: it doesn't, with its own words.
    """
    _deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        # it writes into what it is given
        return DeepSpeedConfig(copy.deepcopy(config))
    except (*FOREIGN_ERRORS, DeepSpeedConfigError) as error:
        raise UserError(refusal(error)) from error


def refusal(error: Exception) -> str:
    """What to say of a configuration that DeepSpeed doesn't take."""
    return (
        f"deepspeed: DeepSpeed can't use the section ({type(error).__name__}: {one_line(error)}); "
        "give what its documentation names, or leave it out"
    )


def _deepspeed() -> Any:
    """Import DeepSpeed so that it compiles nothing and logs to stderr."""
    import deepspeed
    import deepspeed.ops

    # asked which of its ops this machine can compile, it runs the linker, and would then compile
    # its shared-memory collective; nothing else asks
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    logger = logging.getLogger("DeepSpeed")
    for handler in logger.handlers:
        # one of another class is not its own
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr
    return deepspeed
