"""Every case of `benchmarks.device`, timed on the device alone."""

from typing import Any

import torch

from benchmarks.device import (
    LARGEST_ERROR,
    Case,
    Step,
    cases_of,
    distance,
    kernel_microseconds,
    others,
    replayed_microseconds,
    times_of,
)
from benchmarks.gpu.record import Record
from benchmarks.liger import is_installed
from benchmarks.timing import measured_rates


def run(record: Record) -> None:
    """What is held against an op gives the values of its definition, or fails the stage."""
    if not is_installed():
        record.skip("beside Liger-Kernel: liger_kernel is not installed")
    rates = measured_rates(record.device)
    record.note(
        copy_gigabytes_per_second=round(rates["copy"] / 1e9, 1),
        teraflops=round(rates["products"] / 1e12, 2),
    )
    found: dict[str, dict[str, Any]] = {}
    # the ops first, since what stands beside them may outrun the time
    for part in (fill, fill_beside):
        for case in cases_of(record.cases):
            times = found.setdefault(case.name, {})
            made = lambda case=case, times=times, part=part: part(times, case, record)  # noqa: E731
            record.attempt(case.name, made)
            record.note(cases=found)
            if record.device != "cpu":
                torch.cuda.empty_cache()


def fill(times: dict[str, Any], case: Case, record: Record) -> None:
    """The times of a case, and those of a graph of it."""
    call = case.call(record.device)
    check(case.name, distance(call.step, call.definition()()), record)
    times.update(times_of(call, record.device), times_the_op={})
    if record.device != "cpu":
        times["replayed_microseconds"] = record.attempt(
            f"{case.name} in a graph", lambda: round(replayed_microseconds(call.step), 1)
        )


def fill_beside(times: dict[str, Any], case: Case, record: Record) -> None:
    """How many times as long what stands beside a case takes, each for itself."""
    if "microseconds" not in times:
        return
    call = case.call(record.device)
    expected = call.definition()()

    def beside(name: str, step: Step) -> float:
        check(f"{case.name}, {name}", distance(step, expected), record)
        taken = sum(kernel_microseconds(step, record.device).values())
        return round(taken / times["microseconds"], 2)

    for name, step in others(case, call, record.device).items():
        ratio = record.attempt(
            f"{case.name}, {name}", lambda name=name, step=step: beside(name, step)
        )
        times["times_the_op"][name] = ratio


def check(name: str, away: float, record: Record) -> None:
    if away > LARGEST_ERROR:
        record.problem(f"{name}: {away:.2g} away from the definition")
