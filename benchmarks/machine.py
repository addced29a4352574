"""The machine that a result is of, and where a result goes."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import cpuinfo
import torch

from benchmarks.processor import UNITS, units


def set_threads() -> None:
    """Two threads, or one of one core, or as many as `FASTKD_BENCH_THREADS` says."""
    torch.set_num_threads(int(os.environ.get("FASTKD_BENCH_THREADS", min(2, os.cpu_count() or 1))))


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    found = cpuinfo.get_cpu_info()
    return {
        "processor": found.get("brand_raw", platform.machine()),
        UNITS: units(found.get("flags", [])),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(found: dict[str, Any], output: Path | None) -> None:
    """Print a result, and write it where a file is named."""
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if output is not None:
        output.write_text(text, encoding="utf-8")
