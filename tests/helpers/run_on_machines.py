"""Run variants of a recipe as `run_recipes.py` does, each rank on what it takes for another machine
than that of rank 0, which must not write where rank 0 does."""

import os
import runpy
from pathlib import Path
from typing import Any

from fastkd.training.teacher_cache import fill

if __name__ == "__main__":
    rank, opened = os.environ["RANK"], Path.open

    def open_apart(path: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
        if rank != "0" and mode == "r+b" and path.suffix == ".bin":
            raise OSError(f"{path} is written by another machine")
        return opened(path, mode, *given, **named)

    fill.machine = lambda: f"machine {rank}"
    Path.open = open_apart  # type: ignore[method-assign, assignment]
    runpy.run_path(str(Path(__file__).with_name("run_recipes.py")), run_name="__main__")
