"""Every op's jobs: what `machine_code.py` compiles and `floor.py` lists.

Ops are those that `fastkd_kernels` exports, by folder. Beside each stands `jobs_<folder>.py`, with
`WORKLOADS`, the named workloads that it takes; `QUICK`, the names of those that CI compiles, few
but with every kernel and every form of it; and `jobs(work, dtype, on)`, the kernels that one call,
forward and backward, launches on backend `on` ("cuda" or "hip").
"""

from collections.abc import Iterator
from importlib import import_module
from inspect import isfunction
from typing import Any, Protocol, cast

import fastkd_kernels
import torch

from benchmarks.machine_code import Job


class OpJobs(Protocol):
    """What a module `jobs_<folder>.py` has."""

    WORKLOADS: tuple[Any, ...]
    QUICK: tuple[str, ...]

    def jobs(self, work: Any, dtype: torch.dtype, on: str) -> Iterator[Job]: ...


def folders() -> list[str]:
    """The folders of the ops, each once."""
    exported = (getattr(fastkd_kernels, name) for name in fastkd_kernels.__all__)
    return sorted({op.__module__.split(".")[-2] for op in exported if isfunction(op)})


OPS: dict[str, OpJobs] = {
    folder: cast(OpJobs, import_module(f"benchmarks.jobs_{folder}")) for folder in folders()
}
