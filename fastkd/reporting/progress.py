"""Progress bars: one maker, and what differs is what is counted and where it is drawn."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastkd.reporting.streams import LastingConsole, is_terminal


def progress_bar(shown: bool, counts: str = "") -> Progress:
    """The bar of work that is done once and then cached, on stderr; a task's description names it.

    Args:
        shown: whether it is drawn.
        counts: what is counted where the end is unknown: a format of `task.fields`.
    """
    how_far: tuple[ProgressColumn, ...] = (
        (TextColumn(counts), TimeElapsedColumn())
        if counts
        else (MofNCompleteColumn(), TimeRemainingColumn())
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *how_far)
    # FORCE_COLOR would move the cursor in a log
    forced = None if is_terminal(sys.stderr) else False
    console = LastingConsole(stderr=True, force_terminal=forced, force_interactive=forced)
    return Progress(*columns, console=console, disable=not shown)


def live_bar(what: str, console: Console) -> Progress:
    """The bar of a run or a study that is watched; a task's description is the newest numbers."""
    return Progress(
        TextColumn(what),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        # it holds names from elsewhere
        TextColumn("{task.description}", markup=False),
        console=console,
    )
