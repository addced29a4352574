"""Every op once on small inputs under compute-sanitizer, which sees each access to memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.record import Record
from benchmarks.gpu.stages import TAIL_LINES

TOOL = "compute-sanitizer"
# where CUDA is installed without being on the path
USUAL = Path("/usr/local/cuda/bin") / TOOL
SMALL = ["-m", "benchmarks.gpu.small_calls"]
# what those say of each op
CALLED = "called "
# what the tool says where a sandbox stands between it and the GPU
REFUSED = "Device not supported"


def run(record: Record) -> None:
    """A failure where it finds anything; skipped where it is not installed."""
    tool = shutil.which(TOOL) or (str(USUAL) if USUAL.exists() else None)
    command = [sys.executable, *SMALL, record.device]
    if record.device == "cpu":
        record.skip(f"{TOOL}: a dry run makes the calls without it")
    elif tool is None:
        record.skip(f"{TOOL} is not on PATH")
        return
    else:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    # every tensor an allocation of its own, so that what lies beyond one is nobody's
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # to this stage's log, of which something is left where time runs out
    done = subprocess.run(command, check=False, env=env)
    lines = record.path.with_suffix(".log").read_text().splitlines()
    if any(REFUSED in line for line in lines):
        record.skip(f"{TOOL}: {REFUSED}")
        return
    called = [line.removeprefix(CALLED) for line in lines if line.startswith(CALLED)]
    said = [line.strip("= ") for line in lines if "ERROR SUMMARY" in line]
    record.note(called=called, said=said[-1] if said else "no summary")
    if done.returncode:
        record.problem(f"ended with exit code {done.returncode}\n" + "\n".join(lines[-TAIL_LINES:]))
