"""All kernels of the timed cases compiled at once, in processes that fill Triton's cache."""

import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

import torch

from benchmarks.device import CASES, Case, compiled_definition
from benchmarks.gpu.record import Record

MOST_PROCESSES = 14


def run(record: Record) -> None:
    """Each case once, and its compiled definition; later stages find what these leave."""
    wanted = [case for case in CASES if record.wanted(case.name)]
    jobs = [(case, False) for case in wanted] + [(case, True) for case in wanted if case.compiled]
    processes = min(MOST_PROCESSES, len(jobs), os.cpu_count() or 1)
    # inductor's own processes, of each of ours
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
    # forked ones could not use a GPU
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        started: dict[Future[float], str] = {
            pool.submit(run_once, case, record.device, definition=definition): (
                f"{case.name}, definition" if definition else case.name
            )
            for case, definition in jobs
        }
        found: dict[str, float] = {}
        record.note(processes=processes, seconds=found)
        for future in as_completed(started):
            seconds = record.attempt(started[future], future.result)
            if seconds is not None:
                found[started[future]] = round(seconds, 1)
                record.note(seconds=found)


def run_once(case: Case, device: str, *, definition: bool) -> float:
    """Seconds that a case takes, or its definition under torch.compile, inputs included."""
    began = time.monotonic()
    call = case.call(device)
    (compiled_definition(call, device) if definition else call.step)()
    if device != "cpu":
        torch.cuda.synchronize()
        del call
        torch.cuda.empty_cache()
    return time.monotonic() - began
