"""What every kernel benchmark shares: threads, paired runs on either device, what is recorded."""

import functools
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.costs import Cost

# inputs and the memory reading are those of the tests
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

torch.set_num_threads(int(os.environ.get("FASTKD_BENCH_THREADS", min(2, os.cpu_count() or 1))))

Functions = dict[str, Callable[[], Any]]
DEVICE_ROUNDS = 25
# on the CPU, as many as take about this long
ROUNDS_SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 1.0, 5, 25
# a run of more seconds is timed in fewer rounds
SLOW_SECONDS, SLOW_ROUNDS = 1.0, 3
# larger than any L2 cache, so that inputs come from memory
FLUSH_BYTES = 512 << 20


def _seconds(function: Callable[[], Any], device: str) -> float:
    """One run: wall time on the CPU, device time on a GPU, whose work is done when it returns."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return 1e-3 * before.elapsed_time(after)


def _paired_seconds(functions: Functions, device: str) -> dict[str, list[float]]:
    """Seconds of each function in rounds that run all of them in turn.

    On the CPU each is run twice untimed before it is timed: the one before it leaves cold caches
    behind, and a heap that the definition has just grown or shrunk by hundreds of megabytes. Once
    is enough where a run takes seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    # on a GPU this compiles kernels
    first = {name: _seconds(function, device) for name, function in functions.items()}
    for _turn in range(_rounds(first.values(), device)):
        for name, function in functions.items():
            if device == "cpu":
                for _ in range(1 if name == "definition" or first[name] > SLOW_SECONDS else 2):
                    function()
            seconds[name].append(_seconds(function, device))
    return seconds


def _rounds(first: Collection[float], device: str) -> int:
    """Rounds for functions whose first runs took these seconds."""
    if device != "cpu":
        # a first run compiles, so its time says nothing
        return DEVICE_ROUNDS
    if max(first) > SLOW_SECONDS:
        return SLOW_ROUNDS
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, int(ROUNDS_SECONDS / sum(first))))


def _page_faults(function: Callable[[], Any]) -> int:
    """Pages that one run touches anew: of memory that the heap gave back to the system."""
    function()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Most bytes held at once beyond what was held before."""
    from kernel_cases import peak_bytes

    if device == "cpu":
        return peak_bytes(function)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - held


def _launches(function: Callable[[], Any]) -> int:
    """Kernels that one run starts on the GPU, copies and fills left out."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    names = [e.name for e in recorded.events() if e.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


@functools.cache
def measured_rates() -> dict[str, float]:
    """Bytes a second of a copy (read and written) and bf16 operations a second, on this GPU."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    functions: Functions = {
        "copy": lambda: target.copy_(source),
        "products": lambda: left @ right,
    }
    seconds = {
        name: statistics.median(taken) for name, taken in _paired_seconds(functions, "cuda").items()
    }
    return {
        "copy": 2 * source.nbytes / seconds["copy"],
        "products": 2 * 8192**3 / seconds["products"],
    }


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

    Records median milliseconds, how often the op is faster (median of the rounds' ratios), peak
    memory, compulsory bytes and operations, and the environment; on the CPU also page faults, on a
    GPU launches and the shares of the copy bandwidth and bf16 rate measured in the same run.
    Returns the ratios.
    """

    def run(
        op: str, functions: Functions, *, cost: Cost, device: str = "cpu", **shape: Any
    ) -> dict[str, float]:
        seconds = _paired_seconds(functions, device)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        ratios = {
            name: statistics.median(
                theirs / own for theirs, own in zip(taken, seconds[op], strict=True)
            )
            for name, taken in seconds.items()
        }
        benchmark.extra_info.update(
            shape=shape,
            **_environment(device),
            compulsory_bytes=cost.bytes,
            flops=cost.flops,
            milliseconds={name: round(1e3 * median, 3) for name, median in medians.items()},
            times_the_op={name: round(ratio, 2) for name, ratio in ratios.items()},
            peak_megabytes={
                name: round(_peak_bytes(function, device) / 1e6, 2)
                for name, function in functions.items()
            },
        )
        if device == "cpu":
            benchmark.extra_info.update(
                page_faults={name: _page_faults(function) for name, function in functions.items()}
            )
        else:
            benchmark.extra_info.update(
                launches={name: _launches(function) for name, function in functions.items()},
                **_against_the_chip(medians[op], cost),
            )
        rounds = 1 if medians[op] > SLOW_SECONDS else 3
        benchmark.pedantic(lambda: _seconds(functions[op], device), rounds=rounds, warmup_rounds=1)
        return ratios

    return run
