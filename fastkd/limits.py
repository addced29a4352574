"""What this process may use of its machine: cores and memory, also inside a container.

A container sees the cores and the memory of its host; what it may have of them stands in its
control group (cgroup), of version 1 or 2, and in those above it. No library that fastkd needs reads
them all: joblib looks at the outermost group alone, psutil at none.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# of the file system, for tests
_ROOT = Path("/")


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that this process may have."""

    total: int
    free: int
    limit: str = ""
    """What says how many there are in all; empty where it is the machine's size."""


def cores() -> int:
    """Cores that this process may use: its affinity, or less by a quota (`docker --cpus`)."""
    affinity = getattr(os, "sched_getaffinity", None)
    found = len(affinity(0)) if affinity else os.cpu_count() or 1
    for folder in _groups("cpu"):
        given = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(given) == 2 and given[0].isdecimal():
            found = min(found, math.ceil(int(given[0]) / int(given[1])))
    return max(1, found)


def memory() -> Memory:
    """The machine's memory, or less by a control group or by `ulimit -v`."""
    machine = psutil.virtual_memory()
    found = [Memory(machine.total, machine.available)]
    for folder in _groups("memory"):
        used = _used(folder)
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            for limit in _numbers(folder / name):
                found.append(Memory(limit, max(0, limit - used), f"{name} of {folder}"))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        used = psutil.Process().memory_info().vms
        found.append(Memory(limit, max(0, limit - used), "ulimit -v"))
    least = min(found, key=lambda each: each.total)
    return Memory(least.total, min(each.free for each in found), least.limit)


def _used(folder: Path) -> int:
    """Bytes of a control group without the cache of files, which it gives up first."""
    used = [*_numbers(folder / "memory.current"), *_numbers(folder / "memory.usage_in_bytes")]
    words = _words(folder / "memory.stat")
    stat = dict(zip(words[::2], words[1::2], strict=False))
    # of version 1 the groups below are in the second
    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, sum(used) - cache)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own to the outermost that
    it sees, of both versions."""
    for line in _lines(_ROOT / "proc/self/cgroup"):
        number, controllers, name = line.split(":", 2)
        unified = number == "0" and not controllers
        if not unified and controller not in controllers.split(","):
            continue
        for above, place in _mounts("" if unified else controller):
            own = Path(os.path.normpath(name))
            # a container may see its own group as the outermost one, by another name
            below = own.relative_to(above) if own.is_relative_to(above) else Path()
            folder = place / below
            yield from [folder, *folder.parents][: len(below.parts) + 1]


def _mounts(controller: str) -> Iterator[tuple[str, Path]]:
    """Which group is mounted where, of a controller of version 1 or, if it is empty, of version
    2."""
    for line in _lines(_ROOT / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        right = kind == "cgroup" and controller in options.split(",")
        if right if controller else kind == "cgroup2":
            above, place = before.split(" ")[3:5]
            yield above, _ROOT / place.lstrip("/")


def _numbers(path: Path) -> list[int]:
    return [int(word) for word in _words(path) if word.isdecimal()]


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    """Lines of a file, none where it is not there or may not be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
