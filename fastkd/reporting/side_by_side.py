"""`fastkd report RUN...`: finished runs beside each other, a column each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.models.digests import NOTE, noted_models
from fastkd.recipe import read_tree
from fastkd.reporting.console import Reporter
from fastkd.reporting.numbers import fixed
from fastkd.reporting.report import TOTAL, Rows, loss_rows, model_rows, print_summary
from fastkd.reporting.scores import score_values
from fastkd.training.continuation import flat
from fastkd.training.run_folder import RunFolder

_NOTHING = "-"
# of a digest, enough to tell a few apart
_DIGITS = 12
# where runs lie and what is kept of them makes no other student
_APART = ("run.", "data.cache", "task.cache", "teacher.cache_folder", "teacher.cache_limit")


def report_runs(folders: Sequence[Path], reporter: Reporter) -> None:
    """Print the tables of a finished run again, or those of several in one.

    Raises:
        UserError: a folder that holds no finished run, or is named twice.
    """
    named = {os.path.realpath(folder) for folder in folders}
    if len(named) < len(folders):
        raise UserError("a run is named twice; give each once")
    runs = [RunFolder(folder) for folder in folders]
    summaries = [run.read_finished() for run in runs]
    if len(runs) == 1:
        print_summary(summaries[0], reporter)
        return
    heads = ("", *_names(folders))
    recipes = [_fields(read_tree(run.recipe)) for run in runs]
    tables = {
        "recipe, what differs": differences(recipes) + _other_contents(runs, summaries),
        "scores of the student": _beside(summaries, lambda s: score_values(s["after"])),
        "held-out loss": _beside(summaries, _losses),
        "run": _beside(summaries, _facts),
    }
    for title, rows in tables.items():
        if rows:
            reporter.table(title, heads, rows, apart=True)


def differences(recipes: Sequence[Mapping[str, str]]) -> Rows:
    """The fields in which recipes, given by dotted key, are not alike, with the value of each."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: [recipe.get(key, _NOTHING) for recipe in recipes] for key in keys}
    return [
        (key, *shown)
        for key, shown in values.items()
        if len(set(shown)) > 1 and not key.startswith(_APART)
    ]


def _other_contents(runs: Sequence[RunFolder], summaries: Sequence[dict[str, Any]]) -> Rows:
    """What runs read as other bytes, whatever it is called: parts of the data, models; a row each
    with the start of every digest."""
    found = [
        {f"data ({part})": digest for part, digest in summary.get("data_digests", {}).items()}
        | {f"files of {field}": digest for field, digest in _model_digests(run).items()}
        for run, summary in zip(runs, summaries, strict=True)
    ]
    rows = []
    for name in dict.fromkeys(name for one in found for name in one):
        digests = [one.get(name) for one in found]
        # a run that notes none of it says nothing
        if len(set(filter(None, digests))) > 1:
            rows.append((name, *(d[:_DIGITS] if d else _NOTHING for d in digests)))
    return rows


def _model_digests(run: RunFolder) -> dict[str, str]:
    """One digest a model, of all that was read of it; a run of stages notes them in each."""
    for folder in (run.path, run.path / "stage-1"):
        if (folder / NOTE).exists():
            noted = noted_models(folder)
            return {
                field: hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
                for field, files in noted.items()
            }
    return {}


def _fields(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe gives, by dotted key, as a file would have it."""
    given = {key: value for key, value in flat(recipe) if value is not None}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items()}


def _names(folders: Sequence[Path]) -> list[str]:
    """As short as they can be told apart."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = [str(Path(*path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _beside(
    summaries: Sequence[dict[str, Any]], told: Callable[[dict[str, Any]], Mapping[str, str]]
) -> Rows:
    found = [told(summary) for summary in summaries]
    titles = dict.fromkeys(title for one in found for title in one)
    return [(title, *(one.get(title, _NOTHING) for one in found)) for title in titles]


def _losses(summary: dict[str, Any]) -> dict[str, str]:
    after = summary["after"]
    # their weighted sum is of other terms or weights where recipes differ
    rows = loss_rows({"before": after, "after": after})
    return {label: value for label, _, value in rows if label != TOTAL}


def _facts(summary: dict[str, Any]) -> dict[str, str]:
    student = {row[0]: row[-1] for row in model_rows(summary)}
    return {
        "steps": f"{summary['steps']:,}",
        "seconds": fixed(summary["seconds"]),
        "peak memory": f"{fixed(summary['peak_memory_bytes'] / 2**20)} MiB",
        **student,
    }
