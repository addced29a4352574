"""The kernels of the ops on hidden states on the named workloads."""

from collections.abc import Iterator
from typing import Any

import torch
from fastkd_kernels.hidden import triton_kernels
from fastkd_kernels.hidden.torch_path import ZERO_NORM
from fastkd_kernels.hidden.triton_path import hidden_launch, hidden_types, unit_launch

from benchmarks.machine_code import POINTERS, Job
from benchmarks.workloads import HIDDEN, HiddenWorkload

WORKLOADS = tuple(HIDDEN.values())
# with a projection and without one
QUICK = ("bert-base-to-tinybert-4", "minilm-6-to-3")


def jobs(work: HiddenWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    """Those of hidden_mse, then those that the normalised losses launch in their place."""
    projected = work.widths[0] != work.widths[1]
    types, kept = hidden_types(dtype, dtype, dtype if projected else None)
    operand = types.pop("GRAD_OPERAND")
    launch = hidden_launch((dtype, kept), on)
    blocks = {name: size for name, size in launch.constants.items() if name.startswith("BLOCK_")}
    align = 16 // dtype.itemsize
    aligns = {"ALIGN": align, "TEACHER_ALIGN": align, "WEIGHT_ALIGN": align}
    flags = {"HAS_MASK": True, "HAS_WEIGHT": projected, "HAS_BIAS": projected, "STORE": True}
    common = {**types, **aligns, **flags, "BIAS_TYPE": types["TYPE"], "ZERO_NORM": ZERO_NORM}
    exact = {**common, **blocks, "PRECISION": launch.constants["PRECISION"]}
    made = {**exact, "OPERAND": operand, "PRECISION": launch.constants["GRAD_PRECISION"]}
    # without a projection the row gradient is the student's
    stored = POINTERS[kept if projected else torch.float32]
    yield _job(
        "residuals", triton_kernels._fwd_kernel, {**exact, "HAS_TEACHER": True}, stored, launch
    )
    if projected and dtype.itemsize == 4:
        # in half precision the library makes these
        for name, kernel in (
            ("input_gradient", triton_kernels._bwd_dx_kernel),
            ("weight_gradient", triton_kernels._bwd_dw_kernel),
        ):
            yield _job(name, kernel, made, "*fp32", launch, residual=stored)
    if projected:
        alone = {**exact, "HAS_TEACHER": False}
        yield _job("projected", triton_kernels._fwd_kernel, alone, "*fp32", launch)
    unit = unit_launch(work.widths[1])
    kernel, constants = triton_kernels._unit_fwd_kernel, {**common, **unit.constants}
    yield _job("unit_residuals", kernel, constants, stored, unit)


def _job(
    name: str, kernel: Any, constants: dict[str, Any], stored: str, launch: Any, **pointers: str
) -> Job:
    """`stored` is the type of what the kernel writes, gradients or residuals."""
    types = {"residual": stored, "gradient": stored, **pointers}
    types |= dict.fromkeys(("projected", "partials", "bias_gradient"), "*fp32")
    wanted = {key: constants[key] for key in constants if key in kernel.arg_names}
    used = {key: types[key] for key in types if key in kernel.arg_names}
    return Job(name, kernel, wanted, used, launch.num_warps, launch.num_stages)
