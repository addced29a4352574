"""What a row holds at most, in a process of its own: `python -m benchmarks.peers.memory`.

Reads jobs as JSON from stdin and writes an answer for each, a line as it is done. Imports take
longer than a step, so they are made once, and a child is forked for every job.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.peers.vision import declare_operators

ROOT = Path(__file__).parents[2]
# the optimiser has its moments after the first
STEPS = 2


class Job(NamedTuple):
    """A row on a case."""

    group: str
    case: int
    row: str


def peaks(jobs: Sequence[Job], device: str, threads: int, *, quick: bool) -> Iterator[float]:
    """Megabytes of each, in their order.

    Raises:
        AssertionError: a child ended without a number.
    """
    asked = json.dumps({"jobs": jobs, "device": device, "threads": threads, "quick": quick})
    command = [sys.executable, "-m", "benchmarks.peers.memory"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(asked)
        process.stdin.close()
        for job in jobs:
            line = process.stdout.readline()
            assert line, f"the process that measures the memory of {job.row} ended without a number"
            yield float(line)


def _resident(name: str) -> float:
    """A line of the process's status, in megabytes: `VmRSS` now, `VmHWM` at most."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024 / 1e6
    raise AssertionError(f"/proc/self/status has no {name}")


def _peak_of(job: Job, asked: dict[str, Any]) -> float:
    """Most megabytes beyond what stood before the models: weights, moments, a step. On a GPU, of
    its memory."""
    from benchmarks.peers.groups import groups

    torch.set_num_threads(asked["threads"])
    (group,) = (g for g in groups(asked["device"], quick=asked["quick"]) if g.name == job.group)
    (tiny,) = (g for g in groups(asked["device"], quick=True) if g.name == job.group)
    (row,) = (one for one in group.rows if one.key == job.row)
    # what code and compiler take is not the step's
    row.make(tiny.cases[0]).run()
    gc.collect()
    before = _resident("VmRSS")
    step = row.make(group.cases[job.case])
    for _ in range(STEPS):
        step.run()
    if asked["device"] == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return _resident("VmHWM") - before


def main() -> None:
    declare_operators()
    # what imports transformers, and with it torchvision
    from benchmarks.peers.groups import groups

    asked = json.loads(sys.stdin.read())
    answers = os.dup(sys.stdout.fileno())
    # what a library prints is no answer
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for group in groups(asked["device"], quick=True):
        for row in group.present:
            for name in row.imports:
                import_module(name)
    # a child that collects writes to every page that it shares
    gc.freeze()
    for job in asked["jobs"]:
        child = os.fork()
        if child == 0:
            peak = _peak_of(Job(*job), asked)
            os.write(answers, f"{peak}\n".encode())
            # nothing of the parent is the child's to end
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"the memory of {job} was not measured: a child ended with {status}")


if __name__ == "__main__":
    main()
