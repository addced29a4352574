"""The tests that know of a GPU, in pytest: kernels, and whole runs."""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Record
from benchmarks.gpu.recorder import VARIABLE
from benchmarks.gpu.stages import ROOT, RUNS

TESTS = ROOT / "tests"
# enough to see that tests run, pass and are skipped where there is no GPU
DRY = ("test_kernels_capture.py",)
MOST_WORKERS = 14
# without it tests see no GPU
GPU_TESTS = "FASTKD_GPU_TESTS"
SHOWN = 10
_ON_GPU = re.compile(r'"cuda" if|device="cuda"|\.cuda\(\)')


def run(record: Record) -> None:
    """Counts, failing tests with what they said, skips by reason, and the slowest."""
    files = []
    for path in device_tests(record.device):
        absent = sorted(missing(path))
        if absent:
            record.skip(f"{path.name}: not installed: {', '.join(absent)}")
        else:
            files.append(path)
    outcomes = record.path.with_suffix(".jsonl")
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.recorder", "-q"]
    # the options of pyproject.toml are those of plugins that may not be there
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--continue-on-collection-errors"]
    if record.device != "cpu" and find_spec("xdist") is not None:
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        # two at a time: what is slow stands first, and no process has a queue of its own behind it
        command += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "2"]
    elif record.device != "cpu":
        record.skip("in parallel: pytest-xdist is not installed")
    env = {**os.environ, VARIABLE: str(outcomes), GPU_TESTS: str(int(record.device != "cpu"))}
    process = subprocess.Popen([*command, *map(str, files)], cwd=ROOT, env=env)
    code = None
    while code is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(2)
        record.note(files=len(files), **counted(outcomes))
    failed = counted(outcomes)["failed"]
    if failed:
        record.problem(f"{failed} of the tests failed")
    elif code:
        record.problem(f"pytest ended with exit code {code}")


def device_tests(device: str) -> list[Path]:
    """Files that put something on a GPU where there is one."""
    if device == "cpu":
        return [TESTS / name for name in DRY]
    kernels = sorted(TESTS.glob("test_kernels_*.py"))
    asking = [path for path in kernels if _ON_GPU.search(path.read_text(encoding="utf-8"))]
    runs = ("ahead", "gpu_runs", "graphs", "host_reads", "quantised")
    return [*asking, *(TESTS / f"test_{name}.py" for name in runs)]


def missing(path: Path) -> set[str]:
    """Packages that a test file imports, itself or through a helper, and that aren't installed."""
    absent: set[str] = set()
    for name in imported(path):
        helper = TESTS / "helpers" / f"{name}.py"
        if helper.exists():
            absent |= missing(helper)
        elif name == "fastkd":
            absent |= {package for package in RUNS if find_spec(package) is None}
        elif find_spec(name) is None:
            absent.add(name)
    return absent


def imported(path: Path) -> Iterator[str]:
    """Packages that a module imports when it is loaded."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def counted(outcomes: Path) -> dict[str, Any]:
    """What the lines of the recorder add up to."""
    lines: list[dict[str, Any]] = []
    if outcomes.exists():
        # the last one may be half written
        whole = outcomes.read_text().rpartition("\n")[0]
        lines = [json.loads(line) for line in whole.splitlines()]
    collected = max((line["collected"] for line in lines if "collected" in line), default=0)
    lines = [line for line in lines if "outcome" in line]
    counts = Counter(line["outcome"] for line in lines)
    skips = Counter(line["said"] for line in lines if line["outcome"] == "skipped")
    slowest = sorted(lines, key=lambda line: -line["seconds"])[:SHOWN]
    return {
        "collected": collected,
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "failures": {line["test"]: line["said"] for line in lines if line["outcome"] == "failed"},
        "reasons": dict(skips.most_common()),
        "slowest": {line["test"]: line["seconds"] for line in slowest},
    }
