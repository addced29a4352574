"""What a run says while it works: a live bar on a terminal, plain lines in a log.

What is said holds names from recipes, files and models. They are text: never markup of rich, never
a control character of a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from fastkd.errors import printable
from fastkd.reporting.progress import live_bar
from fastkd.reporting.streams import LastingConsole, is_terminal

# wider than any table
_NO_END = 1_000_000
# in characters: what a column has around its cells, and what heads and texts are folded to
_FRAME, _HEAD, _TEXT = 3, 16, 24


class Reporter:
    """Speaks for rank 0; the other ranks hold one that is silent."""

    def __init__(self, *, silent: bool = False) -> None:
        # a log has no width: nothing in it may be folded or cut
        width = None if is_terminal(sys.stdout) else _NO_END
        self.console = LastingConsole(quiet=silent, highlight=False, width=width, soft_wrap=True)
        self._bar: tuple[Progress, TaskID] | None = None

    @property
    def is_live(self) -> bool:
        """Whether someone is watching: FORCE_COLOR makes no terminal of a log, and a dumb terminal
        moves no cursor."""
        console = self.console
        moves = console.is_interactive and not console.is_dumb_terminal
        return moves and is_terminal(console.file) and not console.quiet

    def say(self, text: str) -> None:
        """One line, or several."""
        self.console.print(_plain(text))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        apart: bool = False,
    ) -> None:
        """A table, no cell of which is cut; on a terminal that is too narrow cells are folded.

        Args:
            title: above it.
            columns: heads; the first column is text, the others are numbers.
            rows: as long as the heads.
            apart: whether columns that don't fit beside each other may stand in tables of their
                own, each with the first column.
        """
        parts = _parted(columns, rows, self.console.width) if apart else [[*range(len(columns))]]
        for place, part in enumerate(parts, start=1):
            of = f" ({place} of {len(parts)})" if len(parts) > 1 else ""
            table = Table(title=_plain(title + of, "table.title"), title_justify="left")
            for index in part:
                table.add_column(
                    _plain(columns[index]), justify="right" if index else "left", overflow="fold"
                )
            for row in rows:
                table.add_row(*(_plain(row[index]) for index in part))
            self.console.print(table, crop=False, soft_wrap=False)

    @contextmanager
    def steps(self, done: int, total: int) -> Iterator[None]:
        """Show progress from step `done` to step `total` while the context is open."""
        if not self.is_live:
            yield
            return
        with live_bar("step", self.console) as progress:
            self._bar = progress, progress.add_task("", total=total, completed=done)
            try:
                yield
            finally:
                self._bar = None

    def advance(self, step: int) -> None:
        """A step is done."""
        if self._bar:
            progress, task = self._bar
            progress.update(task, completed=step)

    def metrics(self, step: int, total: int, parts: Sequence[str]) -> None:
        """What `train.log_every` steps gave: first and last part beside the bar, all in a log."""
        if self._bar:
            progress, task = self._bar
            progress.update(task, description=printable(f"{parts[0]}  {parts[-1]}"))
        else:
            self.say("  ".join([f"step {step}/{total}", *parts]))


def _plain(text: str, style: str = "") -> Text:
    return Text("\n".join(map(printable, text.split("\n"))), style)


def _parted(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Columns of tables that each have room for their numbers: the first in every one, then as many
    as fit, at least one."""
    sizes = [
        # long heads, and texts among the numbers, are folded
        _FRAME
        + max(
            min(cell_len(head), _HEAD),
            min(max((cell_len(row[index]) for row in rows), default=0), _TEXT),
        )
        for index, head in enumerate(columns)
    ]
    parts: list[list[int]] = []
    left = 0
    for index, size in enumerate(sizes[1:], start=1):
        if not parts or size > left:
            parts.append([0])
            left = width - sizes[0] - 1
        parts[-1].append(index)
        left -= size
    return parts
