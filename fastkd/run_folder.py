"""The folder that a run is written to: what is in it, and how files get there whole.

recipe.yaml, environment.json, models.json (digests), metrics.jsonl, checkpoints/, student/ (Hugging
Face format), projections.safetensors, summary.json, report.html. A run never writes into a folder
that it did not make, and a reader never sees half of a file.
"""

from __future__ import annotations

import errno
import glob
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastkd.continuation import difference, in_force, longer, why_not_longer
from fastkd.errors import UserError
from fastkd.recipe import AnyRecipe, dump_recipe, load_any_recipe, parse_any_recipe

_PACKAGES = ("fastkd", "torch", "triton", "transformers", "datasets", "deepspeed", "numpy")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# fields that name files and folders, or something on the hub
_PLACES = (
    "model.name",
    "teacher.model",
    "student.init",
    "data.train",
    "data.heldout",
    "data.cache",
    "task.source",
    "task.cache",
    "task.augmentation.masked_model",
    "task.augmentation.glove",
    "task.augmentation.synonyms",
)


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
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.recipe.is_file()

    def check_free(self) -> None:
        """See that a run could start here.

        Raises:
            UserError: the folder holds something already, or can't be looked at.
        """
        if self.holds_run:
            raise UserError(
                f"{self.path} already holds a run; continue it with --resume, "
                "or give another folder with run.output=..."
            )
        with self._folder_errors():
            taken = self.path.exists() and any(self.path.iterdir())
        if taken:
            raise UserError(f"{self.path} is not empty and holds no run; give another run.output")

    def create(self, recipe: AnyRecipe) -> None:
        """Start a run here.

        Raises:
            UserError: the folder can't be made or written to.
        """
        with disk_errors(self.path), self._folder_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            found = {**environment(), "folder": str(Path.cwd())}
            write_whole(self.environment, json.dumps(found, indent=2) + "\n")
            # last, because it is what makes the folder a run
            write_whole(self.recipe, dump_recipe(recipe))

    @contextmanager
    def _folder_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _DISK:
                raise
            raise UserError(
                f"run.output {self.path} can't be used ({error.strerror}); give a folder that you "
                "may write to"
            ) from error

    def begin(self, recipe: AnyRecipe, *, resume: bool) -> dict[str, Any] | None:
        """Start a run here or continue it; the summary if it is finished.

        Raises:
            UserError: the folder is taken, or holds a run of another recipe.
        """
        finished = self.check(recipe, resume=resume)
        if finished is None and not self.holds_run:
            self.create(recipe)
        return finished

    def check(self, recipe: AnyRecipe, *, resume: bool) -> dict[str, Any] | None:
        """See that this recipe can start or continue here; the summary if it is finished.

        Raises:
            UserError: the folder is taken, or holds a run of another recipe.
        """
        if not (resume and self.holds_run):
            self.check_free()
            return None
        self.check_continues(recipe)
        return None if self.longer(recipe) else self.read_summary()

    def check_continues(self, recipe: AnyRecipe) -> None:
        """Refuse to continue a run under a recipe that would change its result.

        Raises:
            UserError: naming the first field that differs.
        """
        there = self.started_in or Path.cwd()
        before = load_any_recipe(self.recipe)
        found = difference(
            _found_from(before.model_dump(mode="json"), there),
            _found_from(recipe.model_dump(mode="json"), Path.cwd()),
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
        # runs of fastkd 0.1 don't say
        found = _parsed(self.environment.read_bytes(), f"{self.environment}", "put it back")
        folder = found.get("folder")
        return Path(folder) if folder and Path(folder).is_dir() else None

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
        tree = _found_from(recipe.model_dump(mode="json"), started, given)
        return parse_any_recipe(tree, str(self.recipe))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with disk_errors(self.path), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl.

        Raises:
            UserError: a line is no record.
        """
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        return [
            _parsed(line, f"{self.metrics}, line {number}", "repair or remove that line", "step")
            for number, line in enumerate(lines, start=1)
            if line.endswith(b"\n")
        ]

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which will be run again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_whole(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        with disk_errors(self.path):
            write_whole(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else `None`.

        Raises:
            UserError: it is damaged.
        """
        if not self.summary.is_file():
            return None
        remedy = "remove it and continue with --resume, which writes it again"
        return _parsed(self.summary.read_bytes(), f"{self.summary}", remedy)


def environment() -> dict[str, Any]:
    """Versions and hardware that a result depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "packages": found,
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old one or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into a `UserError` that says what is safe.

    torch's own writer reports a failed write as a bare RuntimeError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise _disk_full(path, str(error.strerror)) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise _disk_full(path, "the file could not be written") from error


def _parsed(content: bytes, where: str, remedy: str, *keys: str) -> dict[str, Any]:
    """A JSON object with some keys, in one line or a whole file."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        named = f" with {' and '.join(keys)}" if keys else ""
        raise UserError(f"{where} is damaged (no JSON object{named}); {remedy}")
    return found


def _disk_full(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: writing failed ({reason}); earlier checkpoints are whole: free some space and "
        "continue with --resume"
    )


def _found_from(tree: Mapping[str, Any], folder: Path, given: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe whose relative paths are absolute where something is there, seen from a folder; any
    other name is on the hub or nowhere. Keys in `given`, and what is below them, stay."""
    found = dict(tree)
    for place in _PLACES:
        if not any(f"{place}.".startswith(f"{key}.") for key in given):
            found = _replaced(found, place, folder)
    if found.get("stages"):
        found["stages"] = [_found_from(stage, folder) for stage in found["stages"]]
    return found


def _replaced(section: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    value = section.get(head)
    if rest and isinstance(value, dict):
        return {**section, head: _replaced(value, rest, folder)}
    if rest or not value:
        return section
    if isinstance(value, list):
        return {**section, head: [_absolute(name, folder) for name in value]}
    # words, which the recipe reads before it looks for a folder
    word = head == "init" and value in ("teacher", "random")
    return section if word else {**section, head: _absolute(value, folder)}


def _absolute(name: str, folder: Path) -> str:
    if name == "python-docs" or name.startswith("~"):
        return name
    path = folder / name
    if os.path.lexists(path):
        # one file, one name; a link may point elsewhere tomorrow, so it keeps its own
        return str(path.resolve() if ".." in path.parts else path)
    pattern = f"{glob.escape(str(folder))}/{name}"
    return pattern if glob.has_magic(name) and glob.glob(pattern, recursive=True) else name
