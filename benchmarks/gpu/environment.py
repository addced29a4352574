"""What the machine is: GPU, driver, versions, and what its memory and its tensor cores reach."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.record import Record
from benchmarks.timing import measured_rates

# distributions; what a stage can't do without is in its `needs`
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "datasets",
    "pydantic",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "liger-kernel",
)


def run(record: Record) -> None:
    versions = {name: version_of(name) for name in PACKAGES}
    record.note(
        python=platform.python_version(),
        cores=os.cpu_count(),
        versions={name: found for name, found in versions.items() if found},
        missing=[name for name, found in versions.items() if not found],
        gpu="CPU, a dry run",
    )
    if record.device != "cpu":
        record.note(**gpu())
    rates = measured_rates(record.device)
    record.note(
        copy_gigabytes_per_second=round(rates["copy"] / 1e9, 1),
        teraflops=round(rates["products"] / 1e12, 2),
    )


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def gpu() -> dict[str, Any]:
    """Name, memory and driver."""
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "gigabytes": round(found.total_memory / 1e9, 1),
        "processors": found.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": driver(),
    }


def driver() -> str | None:
    """The driver's version, where its program is there to ask."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    return said.stdout.strip().splitlines()[0] if said.stdout.strip() else None
