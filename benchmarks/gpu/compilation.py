"""All kernels of the timed cases and steps compiled at once, in processes that fill the caches."""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial

import torch

from benchmarks.calls import MAKERS
from benchmarks.device import Case, cases_of, compiled_definition
from benchmarks.gpu import small_calls
from benchmarks.gpu.record import Record
from benchmarks.gpu.stages import STEPS, missing

MOST_PROCESSES = 14


def run(record: Record) -> None:
    """Each case once, its compiled definition, a step of each shape, and what memcheck calls: later
    stages find what these leave."""
    work = jobs(record)
    processes = min(MOST_PROCESSES, len(work), os.cpu_count() or 1)
    # forked ones could not use a GPU
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        started: dict[Future[float], str] = {
            pool.submit(timed, job, record.device): name for name, job in work.items()
        }
        found: dict[str, float] = {}
        record.note(processes=processes, seconds=found)
        for future in as_completed(started):
            seconds = record.attempt(started[future], future.result)
            if seconds is not None:
                found[started[future]] = round(seconds, 1)
                record.note(seconds=found)


def jobs(record: Record) -> dict[str, Callable[[], None]]:
    """What is compiled, by name; what takes longest comes first."""
    device = record.device
    wanted = cases_of(record.cases)
    made: dict[str, Callable[[], None]] = {
        f"{case.name}, definition": partial(compile_definition, case, device)
        for case in wanted
        if case.compiled
    }
    absent = missing(STEPS)
    if absent:
        record.skip(f"training steps: not installed: {', '.join(absent)}")
    elif not record.cases:
        from benchmarks.gpu.steps import compile_kernels, shapes_on

        made |= {
            f"step of {shape.name}": partial(compile_kernels, shape, device)
            for shape in shapes_on(device)
        }
    made |= {case.name: partial(compile_kernels_of, case, device) for case in wanted}
    if not record.cases:
        made |= {f"small {op}": partial(small_calls.call, op, device) for op in MAKERS}
    return made


def compile_kernels_of(case: Case, device: str) -> None:
    case.call(device).step()


def compile_definition(case: Case, device: str) -> None:
    compiled_definition(case.call(device), device)()


def timed(job: Callable[[], None], device: str) -> float:
    """Seconds of a job in a process of the pool, inputs included."""
    began = time.monotonic()
    job()
    if device != "cpu":
        torch.cuda.synchronize()
        # the processes share the memory
        torch.cuda.empty_cache()
    return time.monotonic() - began
