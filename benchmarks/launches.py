"""Every op's jobs: what `machine_code.py` compiles and `floor.py` lists.

Ops are those that `fastkd_kernels` exports, by folder; `jobs.py` says what stands beside each.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import isfunction
from typing import Any, NamedTuple, cast

import fastkd_kernels
import torch

from benchmarks.jobs import Job, OpJobs, Run
from benchmarks.recording import Launch, Product, recorded, tensor_bytes


def folders() -> list[str]:
    """The folders of the ops, each once."""
    exported = (getattr(fastkd_kernels, name) for name in fastkd_kernels.__all__)
    return sorted({op.__module__.split(".")[-2] for op in exported if isfunction(op)})


OPS: dict[str, OpJobs] = {
    folder: cast(OpJobs, import_module(f"benchmarks.jobs_{folder}")) for folder in folders()
}


class Calls(NamedTuple):
    """What the calls of an op on one workload launch: kernels, and the library's products."""

    pairs: int
    jobs: tuple[Job, ...]
    products: dict[str, tuple[Product, ...]]


def on_chip(work: Any) -> Any:
    """The workload with the batch of a GPU; one that is not timed there, with its own or 1."""
    return work._replace(batch=work.device_batch or work.batch or 1)


def pairs_of(work: Any) -> int:
    """Layer pairs of one call: a single long sequence fills a GPU by itself."""
    return 4 if work.batch > 1 else 1


@cache
def recorded_calls(op: str, work: Any, dtype: torch.dtype, target: tuple[str, int | str]) -> Calls:
    """Jobs of all calls, equal ones of a call together."""
    work = on_chip(work)
    count = pairs_of(work)
    jobs: list[Job] = []
    products = {}
    for call in OPS[op].calls(work, dtype, count):
        with recorded(target) as made:
            call.run()
        found: dict[str, Job] = {}
        names: Counter[str] = Counter()
        for launch in made:
            if isinstance(launch, Launch):
                job = _job(op, launch, work, dtype, count)
                same = found.setdefault(job.key(), job._replace(runs=()))
                found[job.key()] = same._replace(runs=same.runs + job.runs)
        for job in found.values():
            # forms of one kernel that one call launches: a first chunk and a later one
            names[job.name] += 1
            form = f" {names[job.name]}" if names[job.name] > 1 else ""
            name = f"{call.kind} {job.name}{form}".strip()
            jobs.append(job._replace(name=name, kind=call.kind, counted=call.counted))
        products[call.kind] = tuple(one for one in made if isinstance(one, Product))
    return Calls(count, tuple(jobs), products)


def _job(op: str, launch: Launch, work: Any, dtype: torch.dtype, count: int) -> Job:
    seen = OPS[op].seen(launch, work, dtype, count)
    programs = launch.programs if seen.programs is None else seen.programs
    run = Run(programs, seen.loops, seen.read + tensor_bytes(launch), seen.even)
    return Job(seen.name, launch.kernel, launch.arguments, launch.options, seen.loads, (run,))


def jobs_of(op: str, work: Any, dtype: torch.dtype, target: tuple[str, int | str]) -> Iterator[Job]:
    yield from recorded_calls(op, work, dtype, target).jobs
