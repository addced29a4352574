"""Cut pytest-benchmark files down to what a result needs: no host, no paths.

`python -m benchmarks.slim full.json benchmarks/results/kernels-cpu.json`; several files of one
machine, as of runs of one test module each, become one result.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.processor import UNITS, units


def read_full(source: Path) -> dict[str, Any] | None:
    """What pytest-benchmark wrote; `None` where no benchmark came to its end, of which it leaves no
    file or an empty one."""
    written = source.read_text(encoding="utf-8") if source.is_file() else ""
    full: dict[str, Any] | None = json.loads(written) if written else None
    return full if full and full["benchmarks"] else None


def slim(fulls: list[dict[str, Any]]) -> dict[str, Any]:
    """Processor, versions, and each benchmark's name and recorded numbers."""
    machine = fulls[0]["machine_info"]
    return {
        "processor": machine["cpu"].get("brand_raw", machine["processor"]),
        UNITS: units(machine["cpu"].get("flags", [])),
        "python": machine["python_version"],
        "benchmarks": {
            entry["name"]: entry["extra_info"] for full in fulls for entry in full["benchmarks"]
        },
    }


def run(arguments: list[str]) -> None:
    """Write the result of all files but the last to the last."""
    *sources, target = map(Path, arguments)
    found = []
    for source in sources:
        full = read_full(source)
        if full is None:
            sys.exit(f"{source} holds no benchmark; see what pytest said, and run it again")
        found.append(full)
    target.write_text(json.dumps(slim(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(sys.argv[1:])
