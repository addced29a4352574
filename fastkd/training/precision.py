"""What `auto` comes to on a machine, and what products of fp32 matrices are made of on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.models.half import kept_whole
from fastkd.models.quantised import multiplies_int8
from fastkd.recipe import AnyRecipe, Recipe, load_any_recipe, sequence_limit
from fastkd.training.outlines import trains_in_half
from fastkd.training.run_folder import RunFolder
from fastkd.types import EightBits

R = TypeVar("R", bound=AnyRecipe)
FLOAT8_CAPABILITY = "8.9"
"""From which on torch multiplies float8 with scales of rows."""
PLAIN_ATTENTION_TOKENS = 128
"""Up to which length a CPU trains faster in bf16 on maps of attention than without
(`benchmarks/cpu_attention.py`)."""


def settle_precision(recipe: R, ranks: Ranks, made: RunFolder | None = None) -> R:
    """The recipe with a precision in place of every `auto`; collective over the ranks.

    bf16 on GPUs that compute in it, else fp32; fp32 also under ZeRO-0, which DeepSpeed does not
    take bf16 with, and of a student that keeps parameters in fp32, as routers of experts. A run
    that is there keeps what it was started with.

    Args:
        recipe: of either kind; comes back as it is where nothing is `auto`.
        ranks: of which the first one decides for all.
        made: where the recipe writes to, if a run that is there may be continued.

    Raises:
        UserError: the recipe of the run that is there can't be read.
    """
    if "auto" not in _chosen(recipe):
        return recipe

    def find() -> tuple[str, str]:
        if made is not None and made.holds_run:
            found = _chosen(load_any_recipe(made.recipe))
            if "auto" not in found and len(found) == len(_chosen(recipe)):
                return found[0], found[-1]
        return _best(recipe, half=takes_bf16(ranks.device))

    return _filled(recipe, *ranks.from_main(find))


def precision_on_gpus(recipe: R) -> R:
    """The recipe as `settle_precision` leaves it where GPUs compute in bf16."""
    return _filled(recipe, *_best(recipe, half=True))


def _best(recipe: AnyRecipe, *, half: bool) -> tuple[str, str]:
    rounds = half and recipe.train.precision == "auto" and recipe.train.zero_stage > 0
    if rounds:
        rounds = trains_in_half(_filled(recipe, "fp32", "float32"))
    return "bf16" if rounds else "fp32", "bfloat16" if half else "float32"


def _filled(recipe: R, precision: str, dtype: str) -> R:
    found: dict[str, Any] = {}
    if recipe.train.precision == "auto":
        found["train"] = recipe.train.model_copy(update={"precision": precision})
    if isinstance(recipe, Recipe) and recipe.teacher.dtype == "auto":
        found["teacher"] = recipe.teacher.model_copy(update={"dtype": dtype})
    return cast("R", recipe.model_copy(update=found))


def _chosen(recipe: AnyRecipe) -> tuple[str, ...]:
    teachers = (recipe.teacher.dtype,) if isinstance(recipe, Recipe) else ()
    return recipe.train.precision, *teachers


def takes_bf16(device: torch.device) -> bool:
    """Whether a device is a GPU that computes in bf16 itself."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_eight_bits(kind: EightBits | None, device: torch.device) -> None:
    """See that a device multiplies what a teacher's linear layers are rounded to.

    Args:
        kind: `Teacher.eight_bits`; `None` is right everywhere.
        device: of the run.

    Raises:
        UserError: it doesn't, and what to give instead.
    """
    if kind == "int8" and device.type != "cpu":
        raise UserError(
            "teacher.dtype is int8, which CPUs multiply, but this run is on a GPU; give float8 or "
            "bfloat16"
        )
    if kind == "int8" and not multiplies_int8():
        raise UserError(
            "teacher.dtype is int8, but products of eight bits overflow on this processor, which "
            "has no VNNI; give float32"
        )
    if kind != "float8":
        return
    expected = f"expected a GPU of compute capability {FLOAT8_CAPABILITY} or more (L4, H100, H200)"
    if device.type != "cuda":
        raise UserError(
            f"teacher.dtype is float8, but this run is on a {device.type.upper()}, {expected}; "
            "give int8 or float32"
        )
    if torch.version.hip is not None:
        raise UserError(
            f"teacher.dtype is float8, but this torch is of ROCm {torch.version.hip}, {expected}; "
            "give bfloat16"
        )
    found = torch.cuda.get_device_capability(device)
    if found < tuple(map(int, FLOAT8_CAPABILITY.split("."))):
        raise UserError(
            f"teacher.dtype is float8, but {torch.cuda.get_device_name(device)} has compute "
            f"capability {found[0]}.{found[1]}, {expected}; give bfloat16"
        )


@contextmanager
def tf32_products(device: torch.device, wanted: bool) -> Iterator[None]:
    """Let models' products of fp32 matrices read TF32 on a GPU while the context is open.

    A process that has said how it wants them (`torch.set_float32_matmul_precision`, or
    `torch.backends.cuda.matmul.fp32_precision`) has them so. `fastkd_kernels` makes its own in
    fp32.
    """
    matmul: Any = torch.backends.cuda.matmul
    if device.type != "cuda" or not wanted or matmul.fp32_precision != "none":
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        # as nobody had said anything
        matmul.fp32_precision = "none"


@contextmanager
def attention_on_cpus(device: torch.device, recipe: AnyRecipe) -> Iterator[None]:
    """Let a CPU that trains short sequences in bf16 attend by plain products while the context is
    open: the backward pass of torch's fused attention takes several times as long there, where it
    does not in fp32. A recipe without `auto`."""
    short = sequence_limit(recipe) <= PLAIN_ATTENTION_TOKENS
    if device.type != "cpu" or recipe.train.precision != "bf16" or not short:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def products_of(recipe: AnyRecipe, device: torch.device) -> Iterator[None]:
    """Let models multiply as the steps of a run do while the context is open.

    Args:
        recipe: without `auto`; of stages each has its own.
        device: of this rank.
    """
    with tf32_products(device, recipe.train.tf32), attention_on_cpus(device, recipe):
        yield


def describe_precision(recipe: AnyRecipe, student: PreTrainedModel, device: torch.device) -> str:
    """The precisions of a run in a line; of a recipe without `auto`."""
    trained = recipe.train.precision
    whole = kept_whole(student) if trained == "fp32" and takes_bf16(device) else None
    # the same of a resumed run, whose recipe no longer says that it was left open
    reason = "" if whole is None else f" ({whole}, which bf16 would round)"
    said = f"precision: model {trained}{reason}"
    if isinstance(recipe, Recipe):
        said = f"precision: student {trained}{reason}, teacher {recipe.teacher.dtype}"
    matmul: Any = torch.backends.cuda.matmul
    if device.type == "cuda":
        reads = "TF32" if matmul.fp32_precision == "tf32" else "fp32"
        said += f"; products of fp32 read {reads}, those of the losses' kernels fp32"
    return said
