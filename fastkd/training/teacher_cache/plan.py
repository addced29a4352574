"""Where a run's cache of teacher states lies, what it takes, and whether it pays."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd.capture import Capture
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.data.text.cache import cache_key, is_complete
from fastkd.data.text.datamodule import TextDataModule
from fastkd.errors import UserError
from fastkd.files.disk import disk_errors
from fastkd.models.digests import model_digests
from fastkd.packed_row import PackedRow
from fastkd.recipe import Recipe
from fastkd.reporting.console import Reporter
from fastkd.training.engine import TeacherRunner
from fastkd.training.setup import Run
from fastkd.training.teacher_cache.fill import FIELD, epoch_batches, fill
from fastkd.training.teacher_cache.layout import Field, fields_of, without_values
from fastkd.training.teacher_cache.states import Rows, TeacherStates
from fastkd.types import Inputs

FORMAT = 1
"""Raised when the same settings would give other files."""
_STORED = {"exact": None, "bfloat16": torch.bfloat16}
_TIMED_BATCHES = 3
_PROBE_BYTES = 1 << 25
_GIB = 2**30


@dataclass(frozen=True)
class CachePlan:
    """What is stored of the teacher in a run, and where."""

    form: str
    folder: Path
    fields: tuple[Field, ...]
    rows: Rows
    template: Capture
    """Of one batch: what is the same for all rows."""
    settings: dict[str, Any]
    """What the folder's name is made of."""
    filled: bool

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.rows.entries(field) * field.entry_bytes for field in self.fields)

    def use(self, run: Run, *, progress: bool) -> None:
        """Let a run read its teacher's states from disk, once they are there; collective.

        Raises:
            UserError: they can't be stored, or a rank does not see them.
        """
        assert isinstance(run.teacher, TeacherRunner), "a plan is made for a teacher"
        if not self.filled:
            fill(run, self.folder, self.fields, self.rows, self.settings, progress=progress)
        missing = not is_complete(self.folder, FIELD, build=run.ranks.is_main)
        if any(run.ranks.gather(missing)):
            raise UserError(
                f"{FIELD}: {self.folder} is not whole on every rank; all ranks must see the same "
                "folder"
            )
        run.teacher.stored = TeacherStates(self.folder, self.fields, self.rows, self.template)


def plan_cache(run: Run, form: str) -> CachePlan | None:
    """Plan to store what the losses of a run read of its teacher; collective, writes nothing.

    Args:
        run: of a recipe whose states can be stored, see `Recipe.why_not_cached`.
        form: as `teacher.cache`; of "none" there is no plan.

    Raises:
        UserError: a submodule whose states have no place for each token.
    """
    recipe, teacher = run.recipe, run.teacher
    if form == "none" or not isinstance(recipe, Recipe) or not isinstance(teacher, TeacherRunner):
        return None
    inputs = _batches(run, 1)[0]
    template = teacher.record(inputs)
    if not run.objective.reads_values:
        template = without_values(template)
    row = PackedRow.of(inputs)
    ids = inputs["input_ids"].shape
    shape = (ids[0], ids[1]) if row is None else (len(row.lengths), row.longest)
    fields = fields_of(template, shape, _STORED[form])
    settings = {
        "format": FORMAT,
        "teacher": run.ranks.from_main(lambda: model_digests(recipe.teacher.source)),
        "head": recipe.student.head,
        "dtype": recipe.teacher.dtype,
        "attention": recipe.teacher.attention,
        "tf32": recipe.train.tf32,
        "device": run.ranks.device.type,
        "states": [field.as_dict() for field in fields],
        **_data_of(run),
    }
    folder = Path(recipe.teacher.cache_folder).expanduser() / cache_key(settings)
    return CachePlan(
        form=form,
        folder=folder,
        fields=fields,
        rows=_rows_of(run),
        template=template,
        settings=settings,
        filled=run.ranks.from_main(lambda: is_complete(folder, FIELD)),
    )


def check_room(plan: CachePlan, limit: float) -> None:
    """See that what is to be stored may be, and that the disk has room for it.

    Args:
        plan: of a run.
        limit: GiB, `teacher.cache_limit`.

    Raises:
        UserError: either.
    """
    if plan.size > limit * _GIB:
        raise UserError(
            f"teacher.cache: {_size(plan.size)} of states, but teacher.cache_limit is {limit:g}; "
            f"raise it, {_smaller(plan)}or leave teacher.cache out"
        )
    root = plan.folder.parent
    free = shutil.disk_usage(_existing(root)).free
    if not plan.filled and plan.size > free:
        raise UserError(
            f"{FIELD}: {_size(plan.size)} of states, but {root} has {_size(free)} free; free some, "
            f"name another folder, {_smaller(plan)}or leave teacher.cache out"
        )


def plan_for_run(run: Run) -> CachePlan | None:
    """The cache that a run's recipe asks for, once there is room for it; collective.

    Raises:
        UserError: as `plan_cache` and `check_room`.
    """
    if not isinstance(run.recipe, Recipe):
        return None
    plan = plan_cache(run, run.recipe.teacher.cache)
    if plan is not None:
        found, limit = plan, run.recipe.teacher.cache_limit
        run.ranks.from_main(lambda: check_room(found, limit))
    return plan


def describe(run: Run, plan: CachePlan, reporter: Reporter) -> None:
    """Say what a cache takes, and measure whether it pays; collective."""
    each = plan.size / plan.rows.tokens
    when = "is there" if plan.filled else "is filled before the first step"
    reporter.say(
        f"teacher cache: {plan.form}, {each:,.0f} bytes a token, {_size(plan.size)}; "
        f"{plan.folder} {when}"
    )
    reporter.say(run.ranks.from_main(lambda: _verdict(run, plan, each)))


def _verdict(run: Run, plan: CachePlan, each: float) -> str:
    rate, seconds = disk_rate(plan.folder.parent), _teacher_seconds(run)
    reading = each / rate
    train = run.recipe.train
    times = train.steps * train.batch_size / len(plan.rows)
    passes = times * seconds
    cached = times * reading + (0 if plan.filled else seconds)
    said = "it pays" if cached < passes else "it costs more than it saves"
    if not plan.filled and cached >= passes and reading < seconds:
        said += " unless other runs read it too"
    return (
        f"teacher cache: 1,000 tokens take {1e6 * seconds:.3g} ms of the teacher, "
        f"{1e6 * reading:.3g} ms of a disk that reads {rate / 1e9:.3g} GB/s; the data is read "
        f"{times:.2f} times: {said}"
    )


def disk_rate(folder: Path) -> float:
    """Bytes a second that are read where a folder is or will be, of a file that is not in memory;
    the file is gone afterwards."""
    place = _existing(folder)
    with disk_errors(place, "try again"), tempfile.TemporaryFile(dir=place) as file:
        file.write(os.urandom(_PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        file.read()
        return _PROBE_BYTES / (time.perf_counter() - start)


def _existing(folder: Path) -> Path:
    """A folder, or the nearest above it that there is."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _teacher_seconds(run: Run) -> float:
    """Of one token that is no padding."""
    assert isinstance(run.teacher, TeacherRunner), "a plan is made for a teacher"
    batches = _batches(run, 1 + _TIMED_BATCHES)
    run.teacher.record(batches.pop(0))
    tokens = sum(_tokens(inputs) for inputs in batches)
    start = time.perf_counter()
    for inputs in batches:
        run.teacher.record(inputs)
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize(run.ranks.device)
    return (time.perf_counter() - start) / tokens


def _tokens(inputs: Inputs) -> int:
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else int(mask.sum())


def _batches(run: Run, count: int) -> list[Inputs]:
    """The first micro-batches of an epoch, on the device."""
    batches = epoch_batches(run)
    return [run.move(batches.next_step(number)[0]) for number in range(count)]


def _data_of(run: Run) -> dict[str, Any]:
    data = run.datamodule
    if isinstance(data, TaskDataModule):
        # outputs of the teacher stand in the order of the task's labels
        return {"data": data.train.fingerprint, "task": repr(data.task)}
    assert isinstance(data, TextDataModule), "there are two kinds of data"
    return {"data": data.corpus.fingerprint}


def _rows_of(run: Run) -> Rows:
    data = run.datamodule
    if isinstance(data, TaskDataModule):
        return Rows(np.asarray(data.train.offsets))
    assert isinstance(data, TextDataModule) and data.rows is not None, "a stream is refused before"
    return Rows(np.arange(data.rows + 1, dtype=np.int64) * data.block_size)


def _smaller(plan: CachePlan) -> str:
    return "take teacher.cache=bfloat16, " if plan.form == "exact" else ""


def _size(size: int) -> str:
    return f"{size / _GIB:,.3g} GiB" if size >= _GIB else f"{size / 2**20:,.3g} MiB"
