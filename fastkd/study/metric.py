"""Reading the number by which runs are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastkd.training.run_folder import RunFolder


def read_metric(run: Path, path: str) -> float | str:
    """A number in the summary of a finished run, or what is wrong with it."""
    summary = RunFolder(run).read_summary()
    value = follow(summary, path)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if value is None:
        known = ", ".join(_numbers(summary))
        return f"metric.path: summary.json has no number {path}; it has {known}"
    return f"metric.path: {path} is {json.dumps(value)[:80]}, expected a finite number"


def is_missing(run: Path, path: str) -> bool:
    """Whether the summary of a finished run has nothing at all at a path."""
    parent, _, leaf = path.rpartition(".")
    summary = RunFolder(run).read_summary()
    above = follow(summary, parent) if parent else summary
    return not isinstance(above, dict) or leaf not in above


def follow(tree: Any, path: str) -> Any:
    """What stands at a dotted path, `None` where nothing does."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _numbers(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and "/" not in key:
            yield prefix + key
