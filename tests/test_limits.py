"""Cores and memory of a container: what its control groups allow, of both versions."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastkd import limits
from fastkd.limits import Memory, cores, memory
from fastkd.study.runner import environments

Files = dict[str, str]
HOST_BYTES = (64 << 30, 32 << 30)
V2 = "24 1 0:21 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
V1 = "32 31 0:29 {above} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V1 += "35 31 0:32 {above} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
# as a container of version 1 sees them: by the host's names, mounted from its own on
BOTH = "9:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n0::/\n"


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 cores and 64 GiB, and no limit but those below `tmp_path`."""
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    there = SimpleNamespace(total=HOST_BYTES[0], available=HOST_BYTES[1])
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: there)
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _what: (-1, -1))


def write(root: Path, groups: str, mounts: str, files: Files) -> None:
    made = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts}
    made |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        # docker --cpus 2, in a namespace of its own
        ("0::/\n", V2, {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", V2, {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", V2, {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", V2, {"cpu.max": "max 100000\n"}, 64),
        # the least from its own to the outermost
        ("0::/a/b\n", V2, {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", V2, {"a/cpu.max": "900000 100000\n", "a/b/cpu.max": "4000 1000\n"}, 4),
        # of a neighbour
        ("0::/a\n", V2, {"b/cpu.max": "100000 100000\n"}, 64),
        # moved to a group outside of what it sees
        ("0::/../c\n", V2, {"cpu.max": "500000 100000\n"}, 5),
        (
            BOTH,
            V1.format(above="/docker/a"),
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/cpu.cfs_period_us": "50000\n",
            },
            5,
        ),
        (
            BOTH,
            V1.format(above="/"),
            {
                "cpu,cpuacct/docker/a/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/docker/cpu.cfs_quota_us": "700000\n",
                "cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
            },
            7,
        ),
    ],
)
def test_a_quota_of_any_group_above_bounds_the_cores(
    tmp_path: Path, groups: str, mounts: str, files: Files, expected: int
) -> None:
    write(tmp_path, groups, mounts, files)
    assert cores() == expected


def test_workers_of_a_study_share_the_cores_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environments(2)[0]["OMP_NUM_THREADS"] == "32"
    write(tmp_path, "0::/\n", V2, {"cpu.max": "600000 100000\n"})
    assert environments(2)[0]["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert cores() == 1 and environments(1)[0]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        ("0::/\n", V2, {"memory.max": "max\n", "memory.current": "9\n"}, (*HOST_BYTES, "")),
        (
            "0::/\n",
            V2,
            {
                "memory.max": f"{8 << 30}\n",
                "memory.current": f"{6 << 30}\n",
                "memory.stat": f"file 7\ninactive_file {1 << 30}\n",
            },
            (8 << 30, 3 << 30, "memory.max of {}"),
        ),
        (
            "0::/a\n",
            V2,
            {
                "memory.max": f"{8 << 30}\n",
                "memory.current": f"{7 << 30}\n",
                "a/memory.max": "max\n",
                "a/memory.high": f"{4 << 30}\n",
                "a/memory.current": f"{1 << 30}\n",
            },
            # the group above has less left
            (4 << 30, 1 << 30, "memory.high of {}/a"),
        ),
        (
            BOTH,
            V1.format(above="/docker/a"),
            {
                "memory/memory.limit_in_bytes": f"{2 << 30}\n",
                "memory/memory.usage_in_bytes": f"{3 << 29}\n",
                "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {1 << 29}\n",
            },
            (2 << 30, 1 << 30, "memory.limit_in_bytes of {}/memory"),
        ),
        (
            BOTH,
            V1.format(above="/docker/a"),
            {"memory/memory.limit_in_bytes": "9223372036854771712\n"},
            (*HOST_BYTES, ""),
        ),
    ],
)
def test_memory_is_the_least_of_machine_and_groups(
    tmp_path: Path, groups: str, mounts: str, files: Files, expected: tuple[int, int, str]
) -> None:
    write(tmp_path, groups, mounts, files)
    total, free, limit = expected
    assert memory() == Memory(total, free, limit.format(tmp_path / "sys/fs/cgroup"))


def test_a_limit_of_address_space_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _what: (3 << 30, -1))
    found = memory()
    assert (found.total, found.limit) == (3 << 30, "ulimit -v") and found.free < 3 << 30
