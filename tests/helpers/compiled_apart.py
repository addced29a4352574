"""Compile kernels in a process of its own: this one has triton's interpreter in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastkd_kernels.common.launch import SHARED_MEMORY

ROOT = Path(__file__).parents[2]


def compiled_apart(arguments: list[str], cache: Path) -> list[dict[str, Any]]:
    """The JSON lines that Python prints with these arguments, from the root of the project."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# bytes that a short kernel puts on its stack at most, by kind: a thread holds whole rows, and on an
# H100 a launch of it is faster than three that spill less, with masks too
SHORT_SPILLS = {"js": 640}
OTHER_SHORT_SPILLS = 512
# and others: on an H100 the fastest blocks spill a little; elsewhere none were timed, nor were the
# two sweeps of divergences
SPILLS = {("cuda", 90): 128, ("hip", "gfx942"): 48}
UNTIMED_SPILLS = 512
# of the sweep: addresses that the compiler makes once, and more on Blackwell; not timed yet
SWEEP_SPILLS = {("cuda", 100): 1024}


def fits(row: dict[str, Any]) -> bool:
    """Whether a row of `benchmarks.machine_code` keeps to the chip's registers and shared memory.

    Blocks are those that were fastest on an H100, also where smaller ones would spill nothing.
    """
    target = tuple(row["target"])
    allowed = SPILLS.get(target, UNTIMED_SPILLS)
    if row.get("function", "").endswith("._short_kernel"):
        allowed = SHORT_SPILLS.get(row["kernel"].split()[0], OTHER_SHORT_SPILLS)
    if row.get("function", "").endswith(("._rows_dq_kernel", "._dk_value_kernel")):
        allowed = UNTIMED_SPILLS
    if row.get("function", "").endswith("._sweep_kernel"):
        allowed = SWEEP_SPILLS.get(target, UNTIMED_SPILLS)
    fits_memory = row["shared"] <= SHARED_MEMORY[target]
    return row["registers"] > 0 and row["spills"] <= allowed and fits_memory
