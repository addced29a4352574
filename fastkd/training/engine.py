"""One engine for everything that trains, and a second one for a teacher in shards.

Among several ranks the engine is DeepSpeed's, on one it is a `LocalEngine`. Its module holds the
student and the projections; its `forward` captures, computes the losses and returns them, which is
the only form that is right under ZeRO-3 (parameters are whole only inside the forward of the module
that owns them). The teacher is a plain frozen module on every rank, or a second ZeRO-3 engine
without an optimiser.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from torch import nn
from transformers import PreTrainedModel, get_scheduler

from fastkd.capture.lm_head import last_layer
from fastkd.data.batching import BatchPlan
from fastkd.distributed import Ranks
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.losses.objective import DistilledStudent
from fastkd.models.half import check_rounding, round_buffers
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.training.deepspeed_config import (
    deepspeed_of_student,
    deepspeed_of_teacher,
    uses_deepspeed,
)
from fastkd.training.local_engine import LocalEngine
from fastkd.training.muon import Muon
from fastkd.training.optimizer import flat_pieces, make_optimizer

_MADE: list[Any] = []
"""Engines of DeepSpeed that are not destroyed yet."""


@contextmanager
def engines_ended() -> Iterator[None]:
    """Destroy the engines that are made in the context at its end, while their ranks are there:
    DeepSpeed's hooks hold each, with its moments and its process group, for ever."""
    before = len(_MADE)
    try:
        yield
    except BaseException:
        # what is said is the first error, not what a device that failed makes of this
        with suppress(*FOREIGN_ERRORS):
            _destroy_since(before)
        raise
    _destroy_since(before)


def _destroy_since(before: int) -> None:
    ended = _MADE[before:]
    del _MADE[before:]
    if not ended:
        return
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    for engine in ended:
        engine.destroy()
    # ZeRO-3 puts each module that it shards below all of a pass, and never takes it away
    modules = {id(engine.module) for engine in ended}
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if id(module) not in modules]
    # and keeps what to release after each module by its class; others look that up anew
    for method in filter(inspect.isfunction, vars(PartitionedParameterCoordinator).values()):
        for kept in inspect.getclosurevars(method).nonlocals.values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


def shard_teacher(model: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """A second ZeRO-3 engine, without an optimiser, that holds the teacher's weights in shards."""
    config, deepspeed = deepspeed_of_teacher(recipe), _deepspeed()
    # one weight at a time: of a model that is whole the engine puts all of it on each GPU first
    parts = deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(parts.local_device)
    engine: nn.Module = deepspeed.initialize(model=model, config=config)[0]
    _MADE.append(engine)
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
        UserError: a parameter that DeepSpeed can't hand from rank to rank, or one that stays in
            fp32 where a student trains in bf16.
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
        # either engine rounds all parameters
        check_rounding(module.student)
        round_buffers(module.student)
    module.to(ranks.device)
    if not uses_deepspeed(recipe, ranks.world_size):
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
    _MADE.append(engine)
    if isinstance(optimizer, Muon):
        optimizer.lie_flat(flat_pieces(engine, ranks))
    return engine


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
