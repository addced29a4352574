"""Rows of a whole optimiser step for losses that compare them, see `fastkd.losses.gathering`.

Where a rank has one micro-batch, its rows meet those of the other ranks as the losses ask for them.
Several are read twice, as GradCache does (Gao et al., arXiv 2101.06983): without gradients, to know
all rows of the step, and again to train. So a step then costs another forward pass of both models,
and memory of one micro-batch as ever; `train.micro_batch_size` as large as a rank's share costs
nothing. An evaluation compares groups of as many rows as a step has, so that it finds the same
however a step is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkd.data.batching import BatchPlan
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.losses.gathering import Gather, Notes, alone
from fastkd.losses.objective import Objective


def step_gathers(
    ranks: Ranks, micro_batches: int, read: Callable[[Sequence[Gather]], None]
) -> Sequence[Gather]:
    """What gives each micro-batch of a step the rows of all of it; collective over the ranks.

    Args:
        ranks: this process among all.
        micro_batches: of this rank, as many as of any other.
        read: computes the losses of all of them with these `Gather`s, one each, exactly as they are
            computed again with what is returned.

    Raises:
        UserError: a loss that gathers more of one micro-batch than of another.
    """
    if micro_batches == 1:
        return [_Live(ranks)]
    notes = [Notes() for _ in range(micro_batches)]
    read(notes)
    return _known(notes, ranks)


def group_gathers(
    counts: Sequence[bool], read: Callable[[Sequence[Gather]], None]
) -> Sequence[Gather]:
    """What gives each part of a group of held-out rows the rows of all of it, on this rank alone.

    Args:
        counts: of each part, whether it does: of one that doesn't, no other sees a row.
        read: as of `step_gathers`.

    Raises:
        UserError: likewise.
    """
    if len(counts) == 1:
        return [alone]
    gathers: list[Gather] = [Notes() if counted else alone for counted in counts]
    read(gathers)
    notes = [gather for gather in gathers if isinstance(gather, Notes)]
    known = iter(_known(notes, None))
    return [next(known) if counted else alone for counted in counts]


def _known(notes: Sequence[Notes], ranks: Ranks | None) -> Sequence[Gather]:
    """What gives each micro-batch the rows of all of them, by what was taken down; of all ranks
    where these are given."""
    if len({len(note.rows) for note in notes}) > 1:
        raise UserError(
            f"losses: batch.gather is called {' and '.join(str(len(n.rows)) for n in notes)} times "
            "in the micro-batches of a step; call it equally often whatever a batch holds"
        )
    calls = list(zip(*(note.rows for note in notes), strict=True))
    steps = [torch.cat(rows) for rows in calls]
    firsts = [0] * len(steps)
    if ranks is not None:
        steps = [ranks.rows_of_all(rows) for rows in steps]
        # the rows of a rank follow each other
        firsts = [ranks.rank * len(whole) // ranks.world_size for whole in steps]
    found: list[Gather] = []
    for number in range(len(notes)):
        found.append(_Known(steps, firsts))
        firsts = [first + len(rows[number]) for first, rows in zip(firsts, calls, strict=True)]
    return found


class _Live:
    """Gathers as it is called: the one micro-batch of every rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __call__(self, rows: Tensor) -> Tensor:
        return _with(self._ranks.rows_of_all(rows.detach()), self._ranks.rank * len(rows), rows)


class _Known:
    """Gives, call by call, what was taken down of a step, with the rows of one micro-batch live."""

    def __init__(self, steps: Sequence[Tensor], firsts: Sequence[int]) -> None:
        self._calls = zip(steps, firsts, strict=True)

    def __call__(self, rows: Tensor) -> Tensor:
        whole, first = next(self._calls, (rows[:0], 0))
        if whole[first : first + len(rows)].shape != rows.shape:
            raise ValueError(
                "gathers other rows, or more often, when a step's micro-batches are read again; "
                "gather what no gathered rows went into"
            )
        return _with(whole, first, rows)


def _with(whole: Tensor, first: int, rows: Tensor) -> Tensor:
    """The rows of a step, of which those from `first` on are live."""
    return torch.cat([whole[:first], rows, whole[first + len(rows) :]])


def check_gathering(objective: Objective, plan: BatchPlan, *, recorded: bool) -> None:
    """See that losses that compare rows have rows to compare, and get those of a whole step.

    Args:
        objective: of a run.
        plan: how its steps are cut.
        recorded: whether they are recorded in a CUDA graph.

    Raises:
        UserError: they don't.
    """
    for name, least in objective.least_rows.items():
        rows = plan.micro_batch_size * plan.pieces
        if rows < least:
            raise UserError(
                f"losses.{name} compares the rows of a step, {least} at least, but one has {rows}; "
                "raise train.batch_size"
            )
        if recorded and plan.pieces > 1:
            raise UserError(
                f"train.cuda_graph is on, but losses.{name} compares rows of a whole step, of "
                "which a graph holds one micro-batch; set train.micro_batch_size to "
                "train.batch_size, or leave cuda_graph out"
            )
