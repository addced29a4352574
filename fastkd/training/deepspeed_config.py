"""DeepSpeed's configuration, derived from a recipe by pure functions.

Every key that the recipe decides is written out, also where DeepSpeed has a default: defaults of
the gradient clipping and of the bf16 accumulation have changed between its releases.
"""

from __future__ import annotations

import copy
from typing import Any

from fastkd.data.batching import BatchPlan
from fastkd.errors import UserError
from fastkd.extras import is_installed, need
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.recipe.merge import laid_over


def check_packages(recipe: AnyRecipe) -> None:
    """See that what only some recipes need is installed: of a task, and the trackers, which
    DeepSpeed imports when it starts.

    Raises:
        UserError: naming the package and how to install it.
    """
    if recipe.task is not None:
        need("a task", "tasks")
    monitor = recipe.run.monitor
    if monitor != "none":
        need(f"run.monitor={monitor}", monitor, instead="run.monitor=none")
    comet = recipe.deepspeed.get("comet")
    if isinstance(comet, dict) and comet.get("enabled") and not is_installed("comet_ml"):
        raise UserError("deepspeed.comet needs comet-ml; pip install comet-ml, or leave it out")


def uses_deepspeed(recipe: AnyRecipe, world_size: int) -> bool:
    """Whether a run's student stands in DeepSpeed's engine: among several ranks, and wherever the
    recipe asks DeepSpeed for something. Else there is nothing to shard, at whatever stage."""
    return world_size > 1 or bool(recipe.deepspeed)


def deepspeed_of_student(recipe: AnyRecipe, plan: BatchPlan) -> dict[str, Any]:
    """Configuration of the engine that trains.

    Args:
        recipe: its `deepspeed` section is merged in.
        plan: from `plan_batches`.

    Raises:
        UserError: the `deepspeed` section sets a key that the recipe decides or that has another
            name now, or what a checkpoint can't hold.
    """
    _check_names(recipe.deepspeed)
    _check_kept(recipe.deepspeed)
    train = recipe.train
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        # it rounds bf16 twice, and in every model of the process: a teacher's numbers change too
        zero["memory_efficient_linear"] = False
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": zero,
        # the optimiser is torch's own, so that no extension has to be compiled
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16"},
    }
    if train.precision == "bf16":
        # as one process does: else gradients would be rounded on their way between ranks
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    if train.optimizer == "muon":
        _check_on_device(recipe.deepspeed)
        # which of the optimisers DeepSpeed knows work under ZeRO; ours is tested here
        config["zero_allow_untested_optimizer"] = True
    if recipe.run.monitor == "tensorboard":
        config["tensorboard"] = {
            "enabled": True,
            "output_path": recipe.run.output,
            "job_name": "tensorboard",
        }
    if recipe.run.monitor == "wandb":
        config["wandb"] = {"enabled": True, "project": "fastkd"}
    _check_free(recipe.deepspeed)
    merged = laid_over(config, copy.deepcopy(recipe.deepspeed))
    # a run prints its own progress
    merged.setdefault("steps_per_print", 2**31)
    return merged


def deepspeed_of_teacher(recipe: Recipe) -> dict[str, Any]:
    """Configuration of the second engine, which holds a sharded teacher and never trains."""
    dtype = recipe.teacher.dtype
    zero: dict[str, Any] = {
        "stage": 3,
        # the replacement of torch's linear would change the numbers of every model in the process
        "memory_efficient_linear": False,
    }
    if recipe.teacher.placement == "offload":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "zero_optimization": zero,
    }


def _check_names(section: dict[str, Any]) -> None:
    """Refuse offloading by DeepSpeed's old names, under which nothing here would look for it."""
    zero = section.get("zero_optimization")
    for key, name in _OLD_NAMES.items():
        if isinstance(zero, dict) and key in zero:
            raise UserError(
                f"deepspeed.zero_optimization.{key} is given, whose name is {name} now; give "
                f"{name}: {{device: cpu}}, or leave it out"
            )


def _check_kept(section: dict[str, Any]) -> None:
    """Refuse what keeps weights or states where no checkpoint finds them."""
    zero = section.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise UserError(
            "deepspeed.zero_optimization.offload_optimizer.device is nvme, which no checkpoint of "
            "fastkd holds; give cpu"
        )
    # a second optimiser, or one in a process of its own
    for key in ("ratio", "super_offload"):
        if isinstance(offload, dict) and key in offload:
            raise UserError(
                f"deepspeed.zero_optimization.offload_optimizer.{key} is given, whose optimiser "
                "follows no schedule and no checkpoint of fastkd holds; leave it out"
            )
    # states of its own on the GPU; pieces that are not one for each rank
    for key in ("zenflow", "mics_shard_size"):
        if key in zero:
            raise UserError(
                f"deepspeed.zero_optimization.{key} is given, whose states no checkpoint of fastkd "
                "holds; leave it out"
            )


def _check_on_device(section: dict[str, Any]) -> None:
    """Refuse an optimiser in the machine's memory, where ranks can't add matrices up."""
    zero = section.get("zero_optimization")
    if isinstance(zero, dict) and "offload_optimizer" in zero:
        raise UserError(
            "deepspeed.zero_optimization.offload_optimizer is given, and train.optimizer is muon, "
            "which works on the device; leave it out, or use adamw"
        )


def _check_free(users: dict[str, Any], path: str = "") -> None:
    """Refuse what the recipe decides."""
    for key, value in users.items():
        where = f"{path}{key}"
        field = _decided_by(where, is_section=isinstance(value, dict))
        if field is not None:
            raise UserError(
                f"deepspeed.{where} is given, but the recipe decides it by {field}; "
                "set it there and leave it out of the deepspeed section"
            )
        if isinstance(value, dict):
            _check_free(value, where + ".")


def _decided_by(where: str, *, is_section: bool) -> str | None:
    if where in _RECIPE_DECIDES:
        return _RECIPE_DECIDES[where]
    # one value in place of a section would take the recipe's keys with it
    inside = [key for key in _RECIPE_DECIDES if key.startswith(where + ".")]
    return _RECIPE_DECIDES[inside[0]] if inside and not is_section else None


_OLD_NAMES = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_RECIPE_DECIDES = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.batch_size and train.micro_batch_size",
    "gradient_allreduce_op": "train.batch_size and losses.reduction",
    "gradient_predivide_factor": "train.batch_size and losses.reduction",
    # ranks would share rows, or parts of a model, that are cut by row here
    "sequence_parallel_size": "train.batch_size and train.zero_stage",
    "data_parallel_size": "train.batch_size and train.zero_stage",
    "tensor_parallel": "train.batch_size and train.zero_stage",
    "expert_parallel": "train.batch_size and train.zero_stage",
    "gradient_clipping": "train.max_grad_norm",
    "zero_optimization.stage": "train.zero_stage",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "optimizer": "train.learning_rate and its neighbours",
    "zero_force_ds_cpu_optimizer": "train.learning_rate and its neighbours",
    "scheduler": "train.schedule",
    "tensorboard": "run.monitor and run.output",
    "checkpoint": "train.checkpoint_every and train.keep_checkpoints",
    "wandb.enabled": "run.monitor",
}
