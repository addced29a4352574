"""The folder that a run is written to: what is in it, and how files get there whole.

recipe.yaml, environment.json, models.json (digests), metrics.jsonl, checkpoints/, student/ (Hugging
Face format), projections.safetensors, predictions.npz (where `run.predictions` asks for it),
summary.json, report.html. A run never writes into a folder that it did not make, and a reader never
sees half of a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.files.disk import (
    disk_errors,
    make_folder,
    place_errors,
    sweep,
    write_whole,
)
from fastkd.recipe import AnyRecipe, dump_recipe, load_any_recipe, parse_any_recipe
from fastkd.training.beginnings import (
    FILES,
    FOLDERS,
    holds_beginnings,
    kind_of,
)
from fastkd.training.continuation import (
    difference,
    in_force,
    longer,
    why_not_longer,
)
from fastkd.training.environment import (
    environment,
    start_of,
    started_from,
)
from fastkd.training.metric_lines import Line
from fastkd.training.metrics_file import MetricsFile, parse_object
from fastkd.training.started_paths import found_from

_ELSEWHERE = "try again, or give a run.output that you may write to"


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"
        self.projections = self.path / "projections.safetensors"
        self.predictions = self.path / "predictions.npz"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.recipe.is_file()

    def check_ours(self) -> None:
        """See that a run is here, or could start: what one that was killed as it began left is no
        bar.

        Raises:
            UserError: the folder holds something else, or can't be looked at.
        """
        with disk_errors(self.path, _ELSEWHERE):
            # a link to a folder is one, a link to nothing isn't
            there = os.path.lexists(self.path)
            if there and not self.holds_run and not holds_beginnings(self.path):
                raise UserError(
                    f"{self.path} is not empty and holds no run; give another run.output"
                )

    def create(self, recipe: AnyRecipe) -> None:
        """Start a run here; nothing is done where that was done before.

        Raises:
            UserError: the folder can't be made or written to.
        """
        with place_errors(self.path, _ELSEWHERE):
            make_folder(self.path)
            fresh = not self.holds_run
            if fresh:
                # first, because it is what makes the folder a run
                write_whole(self.recipe, dump_recipe(recipe))
            # of a run that has steps behind it nobody knows where it was started
            if fresh or not (self.environment.exists() or self.metrics.exists()):
                found = {**environment(), **start_of(self.path)}
                write_whole(self.environment, json.dumps(found, indent=2) + "\n")

    def check(self, recipe: AnyRecipe, *, resume: bool) -> dict[str, Any] | None:
        """See that this recipe can start or continue here; the summary if it is finished.

        Raises:
            UserError: the folder is taken, or holds a run of another recipe.
        """
        self.check_ours()
        with disk_errors(self.path, _ELSEWHERE):
            if not self.holds_run:
                return None
            if not resume:
                raise UserError(
                    f"{self.path} already holds a run; continue it with --resume, "
                    "or give another folder with run.output=..."
                )
            self._check_kinds()
            self.check_continues(recipe)
            return None if self.longer(recipe) else self.read_summary()

    def tidy(self) -> None:
        """Remove what killed processes left half-made; for the process that holds the folder."""
        with disk_errors(self.path):
            sweep(self.path, *FILES, self.student.name)
            sweep(self.checkpoints, "latest")
            for checkpoint in self.checkpoints.glob("step-*"):
                sweep(checkpoint, "manifest.json")

    def _check_kinds(self) -> None:
        """See that files are files and folders folders, and none a link to elsewhere.

        Raises:
            UserError: naming the first that isn't.
        """
        inside = sorted(self.path.iterdir())
        folders = [p for p in inside if FOLDERS.fullmatch(p.name)]
        files = [p for p in inside if p.name in FILES]
        # a link in place of it would be followed
        if self.checkpoints in folders and not self.checkpoints.is_symlink():
            folders += sorted(self.checkpoints.glob("step-*"))
        for path, wanted in [(p, "folder") for p in folders] + [(p, "file") for p in files]:
            found = kind_of(path)
            if found != wanted:
                raise UserError(
                    f"{path} is a {found}, expected a {wanted}; move it away, or give another "
                    "run.output"
                )

    def check_continues(self, recipe: AnyRecipe) -> None:
        """Refuse to continue a run under a recipe that would change its result.

        Raises:
            UserError: naming the first field that differs.
        """
        there = self.started_in or Path.cwd()
        before = load_any_recipe(self.recipe)
        found = difference(
            found_from(before.model_dump(mode="json"), there),
            found_from(recipe.model_dump(mode="json"), Path.cwd()),
        )
        if found is not None:
            key, was, given = found
            raise UserError(
                f"{self.path} was started with {key}={was!r}, now {given!r} is given; continue "
                "with the same value, or give another run.output"
            )
        reason = why_not_longer(before, recipe)
        if reason is not None:
            raise UserError(f"{self.path} {reason}")

    def longer(self, recipe: AnyRecipe) -> str | None:
        """What a recipe that may continue this run makes longer, `None` where nothing."""
        return longer(load_any_recipe(self.recipe), recipe)

    def take_over(self, recipe: AnyRecipe) -> None:
        """Let what a recipe changes about the loop be that of the run, which then is not finished.

        Raises:
            UserError: the disk is full.
        """
        before = load_any_recipe(self.recipe)
        now = in_force(before, recipe)
        if now == before:
            return
        with disk_errors(self.path):
            if longer(before, now):
                self.summary.unlink(missing_ok=True)
            write_whole(self.recipe, dump_recipe(now))

    @property
    def started_in(self) -> Path | None:
        """The working folder that the run was started from, if it is known and still there."""
        if not self.environment.is_file():
            return None
        content, where = self.environment.read_bytes(), str(self.environment)
        found = parse_object(content, where, "put it back", "folder", "folder_digest")
        return started_from(self.path, found)

    def read_recipe(self, overrides: Sequence[str] = ()) -> AnyRecipe:
        """The recipe of the run; its relative paths are those of the folder it was started from.

        Args:
            overrides: as in `load_any_recipe`; their paths are those of this folder.

        Raises:
            UserError: as `load_any_recipe`.
        """
        recipe, started = load_any_recipe(self.recipe, overrides), self.started_in
        if started is None:
            return recipe
        given = [override.partition("=")[0] for override in overrides]
        tree = found_from(recipe.model_dump(mode="json"), started, given)
        return parse_any_recipe(tree, str(self.recipe))

    def append_metrics(self, line: Line) -> None:
        """Add one line to metrics.jsonl."""
        with disk_errors(self.path), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sync_metrics(self) -> None:
        """See the lines of metrics.jsonl on disk, before a checkpoint that goes on behind them."""
        with disk_errors(self.path), self.metrics.open("ab") as file:
            os.fsync(file.fileno())

    def read_metrics(self) -> list[Line]:
        """All whole lines of metrics.jsonl, see `metric_lines`.

        Raises:
            UserError: a line is no record.
        """
        return list(self.each_metric())

    def each_metric(self) -> Iterator[Line]:
        """The lines of metrics one by one: all of a long run may be gigabytes."""
        return MetricsFile(self.metrics).new_lines()

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which will be run again."""
        with disk_errors(self.path):
            kept = (line for line in self.each_metric() if line["step"] <= step)
            write_whole(self.metrics, (json.dumps(line) + "\n" for line in kept))

    def write_predictions(self, content: bytes) -> None:
        """Write predictions.npz."""
        with disk_errors(self.path):
            write_whole(self.predictions, content)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        with disk_errors(self.path):
            write_whole(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_finished(self) -> dict[str, Any]:
        """The summary of the run, which has left a student.

        Raises:
            UserError: it is not finished.
        """
        summary = self.read_summary()
        if summary is None or not self.student.is_dir():
            raise UserError(
                f"{self.path} holds no finished run; give the folder of one, or finish it with "
                "--resume"
            )
        return summary

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else `None`.

        Raises:
            UserError: it is damaged.
        """
        if not self.summary.is_file():
            return None
        remedy = "remove it and continue with --resume, which writes it again"
        return parse_object(self.summary.read_bytes(), f"{self.summary}", remedy)
