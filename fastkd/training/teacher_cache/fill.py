"""Fill a folder with a teacher's states: every rank runs its share of the rows, rank 0 finishes.

What is held out, where that is stored, is run in the batches of an evaluation, so that its states
are those to the bit.

The folder has a temporary name until all of it is there and its digests are written. Two jobs that
fill the same one do so beside each other: the first to finish gives it its name, and what the
second made, of the same teacher and data, is thrown away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastkd.data.batching import BatchPlan
from fastkd.data.datamodule import MicroBatches
from fastkd.data.text.cache import machine, new_folder, write_meta
from fastkd.errors import UserError
from fastkd.files.flat import flat_file
from fastkd.packed_row import PackedRow
from fastkd.reporting.progress import progress_bar
from fastkd.training.setup import Run
from fastkd.training.teacher import TeacherRunner
from fastkd.training.teacher_cache.layout import (
    Field,
    Layout,
    is_of_block,
    to_store,
    with_padded_modules,
)
from fastkd.training.teacher_cache.rows import Rows
from fastkd.training.teacher_cache.writing import RowWriter, take_over
from fastkd.types import ROWS, Inputs

FIELD = "teacher.cache_folder"
SETTINGS = "settings.json"


def fill(
    run: Run,
    folder: Path,
    layout: Layout,
    rows: Rows,
    settings: dict[str, Any],
    *,
    progress: bool,
) -> None:
    """Run the teacher on all rows and store what it leaves; collective over the ranks.

    Args:
        run: whose teacher and data.
        folder: that will be there afterwards.
        layout: what is stored.
        rows: where each stands.
        settings: what the folder's name was made of, written beside for people.
        progress: whether to show a bar.

    Raises:
        UserError: a disk that is full or can't be written, on any rank.
    """
    ranks = run.ranks
    first, *others = ranks.gather(machine())
    apart = [rank for rank, each in enumerate(others, start=1) if each != first]
    with ExitStack() as stack:

        def begin() -> str:
            temporary = stack.enter_context(new_folder(folder, FIELD))
            for field in layout.fields:
                with flat_file(temporary, field.name).open("wb") as file:
                    # all of it now: no rank shall find the disk full later
                    os.posix_fallocate(file.fileno(), 0, rows.entries(field) * field.entry_bytes)
            return str(temporary)

        def finish() -> None:
            try:
                for rank in apart:
                    take_over(temporary, layout.fields, rows, rank)
            except OSError as error:
                raise UserError(f"{FIELD}: rank 0 can't take over rank {rank}: {error}") from error
            (temporary / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
            write_meta(temporary, {"rows": len(rows), "tokens": rows.tokens})
            stack.close()

        temporary = Path(ranks.from_main(begin))
        problem = None
        try:
            own = ranks.rank if ranks.rank in apart else None
            with RowWriter(temporary, layout.fields, rows, own) as writer:
                _write_share(run, writer, layout, rows, progress=progress and ranks.is_main)
        except OSError as error:
            problem = f"{FIELD}: rank {ranks.rank} can't write to {temporary}: {error}"
        problems = [found for found in ranks.gather(problem) if found is not None]
        if problems:
            raise UserError(f"{problems[0]}; all ranks must see the same folder, with room in it")
        ranks.from_main(finish)


def epoch_batches(run: Run) -> MicroBatches:
    """All rows of an epoch, and on, in micro-batches of a run's size, the same on every rank."""
    size = run.plan.micro_batch_size
    return run.datamodule.micro_batches(size, 0, BatchPlan(size, 1, 1), 0)


def _write_share(
    run: Run, writer: RowWriter, layout: Layout, rows: Rows, *, progress: bool
) -> None:
    assert isinstance(run.teacher, TeacherRunner), "a plan is made for a teacher"
    with progress_bar(progress) as bar:
        task = bar.add_task("storing the teacher's states", total=len(rows))
        for inputs, places in _batches(run, rows):
            moved = run.move(inputs)
            states = with_padded_modules(run.teacher.record(moved, layout.recorded), moved)
            there = inputs[ROWS].tolist()
            numbers = [there[place] for place in places]
            writer.begin(numbers)
            for field in layout.fields:
                bits = _by_row(to_store(states, field).numpy(), field, PackedRow.of(inputs))
                writer.write(field, numbers, [bits[place] for place in places])
            bar.advance(task, run.ranks.world_size * len(places))


def _by_row(bits: npt.NDArray[Any], field: Field, row: PackedRow | None) -> Sequence[Any]:
    """Entries of each row of a batch, or of a packed one in which they follow each other."""
    if row is None or not is_of_block(field.name):
        return list(bits)
    return np.split(bits[0], np.cumsum(row.lengths)[:-1])


def _batches(run: Run, rows: Rows) -> Iterator[tuple[Inputs, Sequence[int]]]:
    """This rank's batches of all that is stored, and the places in each of the rows to write."""
    ranks, size, count = run.ranks, run.plan.micro_batch_size, run.datamodule.rows
    assert count is not None, "a stream is refused before"
    # all batches on every rank: which rows are written twice must not depend on theirs
    batches = epoch_batches(run)
    seen = np.zeros(len(rows), dtype=bool)
    for number in range(-(-count // size)):
        (inputs,) = batches.next_step(number)
        places = [place for place, row in enumerate(inputs[ROWS].tolist()) if not seen[row]]
        seen[inputs[ROWS].numpy()] = True
        if number % ranks.world_size == ranks.rank:
            yield inputs, places
    if rows.heldout:
        for batch in run.datamodule.heldout(size, ranks):
            yield batch.inputs, range(len(batch.rows))
