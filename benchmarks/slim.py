"""Cut a pytest-benchmark file down to what a result needs: no host, no paths.

`python benchmarks/slim.py full.json benchmarks/results/kernels-cpu.json`
"""

import json
import sys
from pathlib import Path


def slim(full: dict) -> dict:
    """Processor, versions, and each benchmark's name and recorded numbers."""
    machine = full["machine_info"]
    return {
        "processor": machine["cpu"].get("brand_raw", machine["processor"]),
        "python": machine["python_version"],
        "benchmarks": {entry["name"]: entry["extra_info"] for entry in full["benchmarks"]},
    }


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(slim(json.loads(source.read_text())), indent=1) + "\n")
