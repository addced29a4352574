"""Reading the number by which runs are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastkd.training.run_folder import RunFolder

_NOTHING = object()


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
    return _find(RunFolder(run).read_summary(), path.split(".")) is _NOTHING


def follow(tree: Any, path: str) -> Any:
    """What stands at a dotted path, `None` where nothing does.

    A key may hold dots itself, as a set or a class that is named so: where several keys begin the
    path, the longest that leads on counts.
    """
    found = _find(tree, path.split("."))
    return None if found is _NOTHING else found


def _find(tree: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return tree
    for end in range(len(parts), 0, -1) if isinstance(tree, dict) else ():
        key = ".".join(parts[:end])
        found = _find(tree[key], parts[end:]) if key in tree else _NOTHING
        if found is not _NOTHING:
            return found
    return _NOTHING


def _numbers(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and "/" not in key:
            yield prefix + key
