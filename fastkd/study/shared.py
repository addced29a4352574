"""The shared steps of a study: where each is done, what waits for which, and what is borrowed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.study.spec import Step, StudySpec, load_study

_PLACEHOLDER = re.compile(r"\{shared\.([^{}]*)\}")


@dataclass(frozen=True)
class Place:
    """Where one child process works."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """What it is given."""
        return self.folder / "recipe.yaml"

    @property
    def run(self) -> Path:
        """The run folder that it writes."""
        return self.folder / "run"

    @property
    def digest(self) -> Path:
        """File with the digest of what a shared step was made with."""
        return self.folder / "digest.txt"

    @property
    def log(self) -> Path:
        """What it says."""
        return self.folder / "log.txt"


@dataclass(frozen=True)
class SharedRun:
    """A shared step, on one task where it is done once a task, with one seed where it is done
    once a seed."""

    name: str
    step: Step
    task: str | None
    seed: int | None
    place: Place
    needs: tuple[Place, ...]
    """What must be finished before it."""

    @property
    def label(self) -> str:
        """For people."""
        of = [self.task, None if self.seed is None else f"seed {self.seed}"]
        shown = ", ".join(part for part in of if part is not None)
        return f"shared.{self.name}" + (f" ({shown})" if shown else "")


class SharedSteps:
    """The shared steps of a study, and those of other studies that it borrows.

    Args:
        spec: the study.
        path: its file; other studies are named from its folder.

    Raises:
        UserError: a study that can't be read, or has no step of the name.
    """

    def __init__(self, spec: StudySpec, path: Path) -> None:
        self._spec = spec
        self._path = path
        self._borrowed = {name: self._other(name, file) for name, file in spec.borrowed.items()}

    def runs(self) -> Iterator[SharedRun]:
        """What is to be done of them, each after what it needs."""
        for name, step in self._spec.shared.items():
            if step.per_task and not self._spec.tasks:
                raise UserError(
                    f"{self._path}: shared.{name}: per_task, but the study has no tasks"
                )
            for task, seed in self._each(step):
                sets = [overrides for _, overrides in self.sources(step, task)]
                found = {n for values in sets for n in _PLACEHOLDER.findall(json.dumps(values))}
                where = f"{self._path}: shared.{name}"
                needs = tuple(self._place(o, task, seed, where, name) for o in sorted(found))
                place = _place_of(self._spec, name, task, seed)
                yield SharedRun(name, step, task, seed, place, needs)

    def sources(self, step: Step, task: str | None) -> list[tuple[str, Mapping[str, Any]]]:
        """The overrides of a step on a task, by where they come from."""
        shared = {} if task is None else self._spec.tasks[task]
        if step.command == "finetune":
            # the others are about students
            shared = {key: value for key, value in shared.items() if key.split(".")[0] == "task"}
        own = step.tasks.get(task or "", {})
        return [("task", shared), ("overrides", step.overrides), ("tasks", own)]

    def fill(self, value: Any, task: str | None, seed: int | None, where: str) -> Any:
        """A value with the folders of shared steps in it.

        Args:
            value: of an override.
            task: of the run or step that it is of.
            seed: likewise.
            where: stands before every complaint.

        Raises:
            UserError: no such step, or one that is done once a task or seed and this isn't.
        """
        if isinstance(value, dict):
            return {key: self.fill(inner, task, seed, where) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.fill(inner, task, seed, where) for inner in value]
        if not isinstance(value, str):
            return value
        return _PLACEHOLDER.sub(lambda m: str(self._place(m[1], task, seed, where).run), value)

    def borrowed(self) -> Iterator[Place]:
        """Where the steps of other studies are that this one reads."""
        for name, other in self._borrowed.items():
            for task, seed in self._each(other.shared[name]):
                yield _place_of(other, name, task, seed)

    def _each(self, step: Step) -> Iterator[tuple[str | None, int | None]]:
        """The tasks and seeds of this study that a step is done for."""
        tasks = tuple(self._spec.tasks) if step.per_task else (None,)
        return itertools.product(tasks, self._spec.seeds if step.per_seed else (None,))

    def _other(self, name: str, file: str) -> StudySpec:
        given = f"{self._path}: borrowed.{name}"
        other = load_study(self._path.parent / file)
        if name not in other.shared:
            known = ", ".join(other.shared) or "none"
            raise UserError(f"{given}: {file} has no shared step {name!r}; it has {known}")
        step = other.shared[name]
        lacking = [task for task in self._spec.tasks if step.per_task and task not in other.tasks]
        lacking += [
            f"seed {seed}" for seed in self._spec.seeds if step.per_seed and seed not in other.seeds
        ]
        if lacking:
            raise UserError(f"{given}: {file} makes it for other tasks or seeds, not {lacking[0]}")
        return other

    def _place(
        self, name: str, task: str | None, seed: int | None, where: str, before: str | None = None
    ) -> Place:
        names = list(self._spec.shared)
        known = [*self._borrowed, *(names if before is None else names[: names.index(before)])]
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none, for there are none before"
            raise UserError(f"{where}: no shared step {name!r}; expected {expected}")
        spec = self._borrowed.get(name, self._spec)
        step = spec.shared[name]
        for each, given in (("task", task), ("seed", seed)):
            if getattr(step, f"per_{each}") and given is None:
                raise UserError(
                    f"{where}: {{shared.{name}}} is one a {each}; set per_{each} to true here as "
                    "well"
                )
        return _place_of(
            spec, name, task if step.per_task else None, seed if step.per_seed else None
        )


def _place_of(spec: StudySpec, name: str, task: str | None, seed: int | None) -> Place:
    folder = Path(spec.output) / "shared" / name
    folder = folder if task is None else folder / task
    return Place(folder if seed is None else folder / f"seed-{seed}")
