"""Study files whose runs take no time: `fake_run.py` in place of `fastkd`."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import yaml

from fastkd.reporting.console import Reporter
from fastkd.study import run_study

FAKE = (sys.executable, str(Path(__file__).parent / "fake_run.py"))
RECIPE: dict[str, Any] = {
    "teacher": {"model": "nothing"},
    "student": {"layers": 2},
    "losses": {"hidden": {"weight": 1}},
    "task": {"name": "easy", "source": "nowhere", "columns": {"texts": "a", "label": "b"}},
    "train": {"steps": 5},
    "run": {"output": "unused"},
}
# of a shared step
TUNING = {"model": "nothing", "task": RECIPE["task"], "run": {"output": "unused"}}
TASKS = {"easy": {"task.name": "easy"}, "hard": {"task.name": "hard"}}
MAPPINGS = {"uniform": {"layer_map": "uniform"}, "last": {"layer_map": "last"}}
WEIGHTS = {"field": "losses.hidden.weight", "low": 0.1, "high": 100.0, "log": True}


def study_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A study of two mappings with two seeds; a change to `None` leaves a key out."""
    tree = {
        "name": "tried",
        "output": str(folder / "out"),
        "recipe": copy.deepcopy(RECIPE),
        "axes": {"mapping": copy.deepcopy(MAPPINGS)},
        "seeds": 2,
        "metric": {"path": "after.score", "direction": "maximize", "heldout": "score"},
        **changes,
    }
    if tree.get("search"):
        # it chooses by examples that are not reported
        tree["overrides"] = {"task.selection": {"share": 0.5}, **tree.get("overrides", {})}
    return {key: value for key, value in tree.items() if value is not None}


def write_study(folder: Path, **changes: Any) -> Path:
    """Write the study's file."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study_tree(folder, **changes), sort_keys=False))
    return path


def run(path: Path, **options: Any) -> Path:
    """Run a study on the fake."""
    return run_study(path, **{"program": FAKE, "reporter": Reporter(silent=True), **options})


def journal(path: Path) -> list[tuple[str, str]]:
    """What the fake runs noted: a word and the run's name, in order."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for word, folder, *_ in (line.split(" ") for line in lines):
        found.append((word, folder.split("/out/")[1].removesuffix("/run").removeprefix("runs/")))
    return found


def ended(path: Path) -> list[str]:
    """The fake runs that came to an end, in order."""
    return [name for word, name in journal(path) if word == "end"]
