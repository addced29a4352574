"""What every kernel benchmark shares: threads, paired runs, and what is recorded."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# inputs and the memory reading are those of the tests
sys.path.append(str(Path(__file__).parents[1] / "tests"))

torch.set_num_threads(int(os.environ.get("FASTKD_BENCH_THREADS", min(2, os.cpu_count() or 1))))

Functions = dict[str, Callable[[], Any]]


def _paired_seconds(functions: Functions, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each function in rounds that run all of them in turn.

    Each is run twice untimed before it is timed: the one before it leaves cold caches behind, and a
    heap that the definition has just grown or shrunk by hundreds of megabytes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _turn in range(rounds):
        for name, function in functions.items():
            for _ in range(1 if name == "definition" else 2):
                function()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., dict[str, float]]:
    """Time `functions[op]` with pytest-benchmark and all of them in paired rounds.

    Records median milliseconds, how often the op is faster (median of the rounds' ratios), peak
    memory, and the environment. Returns the ratios.
    """
    from kernel_cases import peak_bytes

    def run(op: str, functions: Functions, **shape: Any) -> dict[str, float]:
        seconds = _paired_seconds(functions)
        ratios = {
            name: statistics.median(
                theirs / own for theirs, own in zip(taken, seconds[op], strict=True)
            )
            for name, taken in seconds.items()
        }
        benchmark.extra_info.update(
            shape=shape,
            device="cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            milliseconds={
                name: round(1e3 * statistics.median(taken), 3) for name, taken in seconds.items()
            },
            times_the_op={name: round(ratio, 2) for name, ratio in ratios.items()},
            peak_megabytes={
                name: round(peak_bytes(function) / 1e6, 2) for name, function in functions.items()
            },
        )
        benchmark.pedantic(functions[op], rounds=3, warmup_rounds=1)
        return ratios

    return run
