"""How long functions take, in turn so that a busy machine slows all alike; what they hold; and what
a device reaches at best."""

import functools
import resource
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.costs import Cost

Functions = dict[str, Callable[[], Any]]
DEVICE_ROUNDS = 25
# on the CPU, as many as take about this long
ROUNDS_SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 1.0, 5, 25
# a run of more seconds is timed in fewer rounds
SLOW_SECONDS, SLOW_ROUNDS = 1.0, 3
# larger than any L2 cache, so that inputs come from memory
FLUSH_BYTES = 512 << 20


def seconds_of(function: Callable[[], Any], device: str) -> float:
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


def paired_seconds(functions: Functions, device: str) -> dict[str, list[float]]:
    """Seconds of each function in rounds that run all of them in turn.

    On the CPU each is run twice untimed before it is timed: the one before it leaves cold caches
    behind, and a heap that the definition has just grown or shrunk by hundreds of megabytes. Once
    is enough for the definition, which is what moves that heap, and where a run takes seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    # on a GPU this compiles kernels
    first = {name: seconds_of(function, device) for name, function in functions.items()}
    for _turn in range(_rounds(first.values(), device)):
        for name, function in functions.items():
            if device == "cpu":
                for _ in range(1 if name == "definition" or first[name] > SLOW_SECONDS else 2):
                    function()
            seconds[name].append(seconds_of(function, device))
    return seconds


def _rounds(first: Collection[float], device: str) -> int:
    """Rounds for functions whose first runs took these seconds."""
    if device != "cpu":
        # a first run compiles, so its time says nothing
        return DEVICE_ROUNDS
    if max(first) > SLOW_SECONDS:
        return SLOW_ROUNDS
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, int(ROUNDS_SECONDS / sum(first))))


def page_faults(function: Callable[[], Any]) -> int:
    """Pages that one run touches anew: of memory that the heap gave back to the system."""
    function()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Most bytes held at once beyond what was held before."""
    if device == "cpu":
        # found beside the tests, by pytest's configuration or by `benchmarks.inputs`
        from kernel_cases import peak_bytes as peak_bytes_on_cpu

        return int(peak_bytes_on_cpu(function))
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - held


def device_events(events: Sequence[Any]) -> list[Any]:
    """Kernels, copies and fills of a profile, without the ranges that are marked around them."""
    # a range that the host marks is listed on the device too, by its name
    marks = {event.name for event in events if event.is_user_annotation}
    return [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and event.name not in marks
    ]


def launches(function: Callable[[], Any]) -> int:
    """Kernels that one run starts on the GPU, copies and fills left out."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in device_events(recorded.events())]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


@functools.cache
def measured_rates(device: str = "cuda") -> dict[str, float]:
    """Bytes a second of a copy (read and written) and operations a second of a matrix product.

    On a GPU the product is of bf16; on the CPU both are small, the product of fp32.
    """
    on_cpu = device == "cpu"
    size, copied = (256, 1 << 20) if on_cpu else (8192, 1 << 30)
    dtype = torch.float32 if on_cpu else torch.bfloat16
    source = torch.empty(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    functions: Functions = {
        "copy": lambda: target.copy_(source),
        "products": lambda: left @ right,
    }
    taken = {
        name: statistics.median(seconds)
        for name, seconds in paired_seconds(functions, device).items()
    }
    return {
        "copy": 2 * source.nbytes / taken["copy"],
        "products": 2 * size**3 / taken["products"],
    }


def floor_seconds(cost: Cost, device: str = "cuda") -> float:
    """The least time of a cost by the rates measured in this process."""
    rates = measured_rates(device)
    return max(cost.bytes / rates["copy"], cost.flops / rates["products"])
