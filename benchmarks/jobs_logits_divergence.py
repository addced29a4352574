"""The kernels of logits_divergence on the named workloads."""

from collections.abc import Iterator
from typing import Any, get_args

import torch
from fastkd_kernels import LogitsDivergenceKind
from fastkd_kernels.common.tl_types import TYPES
from fastkd_kernels.logits_divergence.triton_kernels import _matmul_kernel, _row_kernel
from fastkd_kernels.logits_divergence.triton_path import (
    product_constants,
    product_launch,
    row_launch,
    small,
)

from benchmarks.machine_code import POINTERS, Job
from benchmarks.workloads import LOGITS, LogitsWorkload

WORKLOADS = tuple(LOGITS.values())
QUICK = ("logits-32k-2048",)
# name: transposed operands, and the flags that differ
PRODUCTS: dict[str, dict[str, bool]] = {
    "logits": {"RIGHT_TRANSPOSED": True, "HAS_BIAS": True},
    "hidden_gradient": {},
    "weight_gradient": {"LEFT_TRANSPOSED": True, "HAS_MASK": True, "ADD": True},
}
FLAGS = ("LEFT_TRANSPOSED", "RIGHT_TRANSPOSED", "HAS_BIAS", "HAS_MASK", "ADD")


def jobs(work: LogitsWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    """Products in fp32, aligned or not, and rows of every kind: the library makes half products."""
    for name, given in PRODUCTS.items() if dtype.itemsize == 4 else ():
        for align in (16 // dtype.itemsize, 1):
            launch = product_launch(dtype, align > 1, on)
            constants: dict[str, Any] = {
                **product_constants(launch, dtype, torch.float32),
                "ALIGN": align,
                **{flag: given.get(flag, False) for flag in FLAGS},
            }
            pointers = {operand: POINTERS[dtype] for operand in ("left", "right", "bias")}
            pointers["out"] = "*fp32"
            label = name if align > 1 else f"{name}_unaligned"
            yield Job(label, _matmul_kernel, constants, pointers, *launch[1:])
    launch = row_launch(work.vocabulary)
    floats = ("student", "teacher", "scalars", "factors", "values")
    pointers = {name: "*fp32" for name in floats}
    pointers |= {"labels": "*i64", "gradient": POINTERS[dtype]}
    # the gradient is the larger program; without it, one kind stands for all
    for kind, store in (*((kind, True) for kind in get_args(LogitsDivergenceKind)), ("js", False)):
        constants = {
            **launch.constants,
            "SUM_TYPE": TYPES[torch.float32],
            "KIND": kind,
            "SMALL": small(torch.float32),
            "EVEN": kind == "js",
            "STUDENT_STORED": True,
            "TEACHER_STORED": True,
            "HAS_MASK": True,
            "HAS_LABELS": True,
            "STORE": store,
        }
        name = f"{kind}_rows_and_gradient" if store else f"{kind}_rows"
        yield Job(name, _row_kernel, constants, pointers, *launch[1:])
