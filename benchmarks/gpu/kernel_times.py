"""Every case of `benchmarks.device`, timed on the device alone."""

from typing import Any

import torch

from benchmarks.device import CASES, Case, measured, replayed_microseconds
from benchmarks.gpu.record import Record
from benchmarks.liger import is_installed
from benchmarks.timing import measured_rates


def run(record: Record) -> None:
    if not is_installed():
        record.skip("beside Liger-Kernel: liger_kernel is not installed")
    rates = measured_rates(record.device)
    record.note(
        copy_gigabytes_per_second=round(rates["copy"] / 1e9, 1),
        teraflops=round(rates["products"] / 1e12, 2),
    )
    found = {}
    for case in CASES:
        if not record.wanted(case.name):
            continue
        times = record.attempt(case.name, lambda case=case: timed(case, record))
        if times is not None:
            found[case.name] = times
            record.note(cases=found)
        if record.device != "cpu":
            torch.cuda.empty_cache()


def timed(case: Case, record: Record) -> dict[str, Any]:
    call = case.call(record.device)
    found = measured(case, call, record.device)
    if record.device != "cpu":
        found["replayed_microseconds"] = record.attempt(
            f"{case.name} in a graph", lambda: round(replayed_microseconds(call.step), 1)
        )
    return found
