"""Cut pytest-benchmark files down to what a result needs: no host, no paths.

`python benchmarks/slim.py full.json benchmarks/results/kernels-cpu.json`; several files of one
machine, as of runs of one test module each, become one result.
"""

import json
import sys
from pathlib import Path


def slim(fulls: list[dict]) -> dict:
    """Processor, versions, and each benchmark's name and recorded numbers."""
    machine = fulls[0]["machine_info"]
    return {
        "processor": machine["cpu"].get("brand_raw", machine["processor"]),
        "python": machine["python_version"],
        "benchmarks": {
            entry["name"]: entry["extra_info"] for full in fulls for entry in full["benchmarks"]
        },
    }


if __name__ == "__main__":
    *sources, target = map(Path, sys.argv[1:])
    result = slim([json.loads(source.read_text()) for source in sources])
    target.write_text(json.dumps(result, indent=1) + "\n")
