"""What every kernel benchmark shares: threads, paired runs on either device, what is recorded."""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.costs import Cost
from benchmarks.machine import set_threads
from benchmarks.timing import (
    SLOW_SECONDS,
    Functions,
    launches,
    measured_rates,
    page_faults,
    paired_seconds,
    peak_bytes,
    seconds_of,
)
from benchmarks.training_step import ends_of, paired_ratios

set_threads()


def _against_the_chip(seconds: float, cost: Cost) -> dict[str, Any]:
    """How near a time comes to what this GPU was measured to do."""
    rates = measured_rates()
    moving, multiplying = cost.bytes / rates["copy"], cost.flops / rates["products"]
    return {
        "copy_gigabytes_per_second": round(rates["copy"] / 1e9, 1),
        "bf16_teraflops": round(rates["products"] / 1e12, 1),
        "share_of_copy_bandwidth": round(moving / seconds, 3),
        "share_of_bf16_rate": round(multiplying / seconds, 3),
        "share_of_floor": round(max(moving, multiplying) / seconds, 3),
    }


def _rounded(ends: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(end, 2) for end in of] for name, of in ends.items()}


def _environment(device: str) -> dict[str, Any]:
    made = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device == "cpu":
        return made
    import triton

    return {
        **made,
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
    }


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., dict[str, float]]:
    """Time `functions[op]` with pytest-benchmark and all of them in paired rounds.

    Records median milliseconds, how often the op is faster (median, quartiles and range of the
    rounds' ratios), peak memory, compulsory bytes and operations, and the environment; on the CPU
    also page faults, on a GPU launches and the shares of the copy bandwidth and bf16 rate measured
    in the same run.
    Returns the ratios.
    """

    def run(
        op: str, functions: Functions, *, cost: Cost, device: str = "cpu", **shape: Any
    ) -> dict[str, float]:
        seconds = paired_seconds(functions, device)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        paired = paired_ratios(seconds, op)
        ratios = {name: statistics.median(values) for name, values in paired.items()}
        quartiles, ranges = ends_of(paired)
        benchmark.extra_info.update(
            shape=shape,
            **_environment(device),
            compulsory_bytes=cost.bytes,
            flops=cost.flops,
            milliseconds={name: round(1e3 * median, 3) for name, median in medians.items()},
            times_the_op={name: round(ratio, 2) for name, ratio in ratios.items()},
            quartiles_of_times_the_op=_rounded(quartiles),
            range_of_times_the_op=_rounded(ranges),
            peak_megabytes={
                name: round(peak_bytes(function, device) / 1e6, 2)
                for name, function in functions.items()
            },
        )
        if device == "cpu":
            benchmark.extra_info.update(
                page_faults={name: page_faults(function) for name, function in functions.items()}
            )
        else:
            benchmark.extra_info.update(
                launches={name: launches(function) for name, function in functions.items()},
                **_against_the_chip(medians[op], cost),
            )
        rounds = 1 if medians[op] > SLOW_SECONDS else 3
        benchmark.pedantic(
            lambda: seconds_of(functions[op], device), rounds=rounds, warmup_rounds=1
        )
        return ratios

    return run
