"""The stages of `python -m benchmarks.gpu`: in order, each a process with a share of the time.

A process of its own, because a kernel that hangs or writes where it must not can only be ended with
the process that launched it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
# what a stage says at its end on timeout takes no longer
GRACE_SECONDS = 5.0
TAIL_LINES = 25


class Stage(NamedTuple):
    """A stage; `name` is also that of its module in this folder, `share` is relative."""

    name: str
    share: float
    needs: tuple[str, ...] = ()


LOSSES = ("transformers", "pydantic", "yaml", "numpy", "scipy", "psutil", "safetensors")
RUNS = (*LOSSES, "datasets", "huggingface_hub", "rich", "tokenizers", "typer")
STEPS = Stage("steps", 0.13, LOSSES)
STAGES = (
    Stage("environment", 0.02),
    Stage("compilation", 0.14),
    Stage("tests", 0.32, ("pytest",)),
    Stage("kernel_times", 0.18),
    STEPS,
    Stage("runs", 0.18, RUNS),
    Stage("memcheck", 0.03),
)


def missing(stage: Stage) -> list[str]:
    """Packages that a stage needs and that are not installed."""
    return [name for name in stage.needs if find_spec(name) is None]


def file_of(stage: Stage, out: Path) -> Path:
    """Where the JSON of a stage lies."""
    return out / f"{stage.name}.json"


def limit_of(left: float, stages: Sequence[Stage]) -> float:
    """Seconds of the first of the stages that are still to come: what one leaves, the next get."""
    return left * stages[0].share / sum(stage.share for stage in stages)


def run_stages(
    stages: Sequence[Stage], out: Path, device: str, budget: float, *, cases: Sequence[str] = ()
) -> bool:
    """Run stages in order, say of each how it ended; whether none of them failed."""
    deadline = time.monotonic() + budget
    failed = []
    for number, stage in enumerate(stages):
        limit = limit_of(max(deadline - time.monotonic(), 0.0), stages[number:])
        result = run_stage(stage, out, device, limit, cases=cases)
        print(f"{stage.name}: {result['status']}, {result['seconds']:.0f} s", flush=True)
        if result["status"] == "failed":
            failed.append(stage.name)
    return not failed


def read(path: Path) -> dict[str, Any]:
    """What a stage has written, nothing where it has not yet."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: the process may be ended at any moment."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def run_stage(
    stage: Stage, out: Path, device: str, limit: float, *, cases: Sequence[str] = ()
) -> dict[str, Any]:
    """Run one stage to its end or its limit; what its JSON now holds.

    `status` is "done", "failed" or "skipped", `problems` says why, and `found` is all that the
    stage had noted by then.
    """
    path = file_of(stage, out)
    path.unlink(missing_ok=True)
    began = time.monotonic()
    absent = missing(stage)
    problems: list[str] = []
    if not absent:
        problems = _in_a_process(stage, out, device, limit, cases)
    noted = read(path)
    problems = [*noted.get("problems", []), *problems]
    skipped = [*noted.get("skipped", [])]
    if absent:
        skipped.append("not installed: " + ", ".join(absent))
    found = noted.get("found", {})
    status = "failed" if problems else "done" if found else "skipped"
    result = {
        "stage": stage.name,
        "device": device,
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "limit_seconds": round(limit, 1),
        "problems": problems,
        "skipped": skipped,
        "found": found,
    }
    write(path, result)
    return result


def _in_a_process(
    stage: Stage, out: Path, device: str, limit: float, cases: Sequence[str]
) -> list[str]:
    """What went wrong beside what the stage itself noted."""
    path = file_of(stage, out)
    log = path.with_suffix(".log")
    module = f"benchmarks.gpu.{stage.name}"
    command = [sys.executable, "-m", "benchmarks.gpu.record", module, str(path), device, *cases]
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(device),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            # faulthandler says where it was
            process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            return [f"took longer than its {limit:.0f} seconds\n{_tail(log)}"]
        finally:
            # also what it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [f"ended with exit code {code}\n{_tail(log)}"] if code else []


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def environment(device: str) -> dict[str, str]:
    """Of a process that finds this repository first, whether or not fastkd is installed."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    made = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # inductor's own processes cannot unpickle what a definition closes over
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    made.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        made |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return made
