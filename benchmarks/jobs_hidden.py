"""The kernels of the ops on hidden states on the named workloads."""

from collections.abc import Iterator

import torch
from fastkd_kernels import hidden_kernels
from fastkd_kernels.hidden_launch import hidden_launch
from fastkd_kernels.hidden_triton import hidden_types

from benchmarks.machine_code import POINTERS, Job
from benchmarks.workloads import HIDDEN, HiddenWorkload

WORKLOADS = tuple(HIDDEN.values())
QUICK = ("bert-base-to-tinybert-4",)


def jobs(work: HiddenWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    types, kept = hidden_types(dtype, dtype, dtype)
    operand = types.pop("GRAD_OPERAND")
    launch = hidden_launch((dtype, kept), on)
    blocks = {name: size for name, size in launch.constants.items() if name.startswith("BLOCK_")}
    align = 16 // dtype.itemsize
    aligns = {"ALIGN": align, "TARGET_ALIGN": align, "WEIGHT_ALIGN": align}
    flags = {"HAS_MASK": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "STORE": True}
    exact = {**types, **blocks, **aligns, **flags, "BIAS_TYPE": types["TYPE"]}
    exact["PRECISION"] = launch.constants["PRECISION"]
    made = {**exact, "OPERAND": operand, "PRECISION": launch.constants["GRAD_PRECISION"]}
    types = {"residual": POINTERS[kept]}
    types |= {name: "*fp32" for name in ("partials", "gradient", "bias_gradient")}
    for kernel, constants in (
        (hidden_kernels.residuals, exact),
        (hidden_kernels.input_gradient, made),
        (hidden_kernels.weight_gradient, made),
    ):
        wanted = {name: constants[name] for name in constants if name in kernel.arg_names}
        pointers = {name: types[name] for name in types if name in kernel.arg_names}
        yield Job(kernel.__name__, kernel, wanted, pointers, *launch[1:])
