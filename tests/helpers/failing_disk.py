"""Run a recipe on a disk that fails from one of its writes on, then mend the disk and resume.

Used as `python failing_disk.py recipe.yaml ERRNO FIRST EVERY`: the openings, renamings and makings
of the run are counted, and it is tried with each of those from FIRST on in steps of EVERY. Prints
JSON: of each what the user was told, and what a resumed run came to. What libraries in C++ and Rust
write is seen by nobody here: for those `disturbed_run.py` limits the size of files.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from disk_changes import on_change

from fastkd.distributed import (
    Ranks,
    start_ranks,
    stop_ranks,
)
from fastkd.errors import UserError
from fastkd.files.disk import disk_errors
from fastkd.recipe import load_any_recipe
from fastkd.reporting.console import Reporter
from fastkd.reporting.report import write_report
from fastkd.training.loop import run_recipe

# a full disk still lets go of what it has
_FREEING = ("os.remove", "os.rmdir", "os.chmod")
_EROFS = 30


class Disk:
    """Everything below a folder fails from the given write on."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.folder = ""
        self.writes = 0
        self.fails_from: int | None = None
        on_change(self._see)

    def _see(self, event: str, path: str) -> None:
        if not self.folder or not path.startswith(self.folder):
            return
        if event in _FREEING and self.number != _EROFS:
            return
        self.writes += 1
        if self.fails_from is not None and self.writes >= self.fails_from:
            raise OSError(self.number, os.strerror(self.number), path)


def attempt(recipe_path: str, output: Path, ranks: Ranks) -> str:
    """`finished`, the line that the user sees, or a whole trace, whatever it is of."""
    recipe = load_any_recipe(recipe_path, [f"run.output={output}"])
    try:
        with disk_errors(output):
            silent = Reporter(silent=True)
            run_recipe(recipe, ranks, resume=True, reporter=silent, report=write_report)
    except UserError as error:
        return str(error)
    except Exception:
        return traceback.format_exc()
    return "finished"


def main() -> None:
    """Count, and try."""
    path, number, first, every = sys.argv[1], *map(int, sys.argv[2:])
    ranks = start_ranks()
    disk, found = Disk(number), {}
    base = Path(path).parent / "counted"
    disk.folder = str(base)
    assert attempt(path, base, ranks) == "finished"
    writes = disk.writes
    for at in range(first, writes + 1, every):
        output = base.with_name(f"failing-{number}-{at}")
        disk.writes, disk.fails_from, disk.folder = 0, at, str(output)
        said = attempt(path, output, ranks)
        disk.folder = ""
        found[at] = (said, attempt(path, output, ranks))
    stop_ranks()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
