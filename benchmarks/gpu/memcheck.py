"""Every op once on small inputs under compute-sanitizer, which sees each access to memory."""

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.record import Record

TOOL = "compute-sanitizer"
# where CUDA is installed without being on the path
USUAL = Path("/usr/local/cuda/bin") / TOOL
SMALL = ["-m", "benchmarks.gpu.small_calls"]


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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr)
    called = [line for line in done.stdout.splitlines() if not line.startswith("=")]
    said = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    record.note(called=called, said=said[-1].strip("= ") if said else "no summary")
    if done.returncode:
        record.problem(f"ended with exit code {done.returncode}; see the log")
