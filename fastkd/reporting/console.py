"""What a run says while it works: a live bar on a terminal, plain lines in a log.

What is said holds names from recipes, files and models. They are text: never markup of rich, never
a control character of a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from fastkd.errors import printable
from fastkd.reporting.progress import live_bar


class Reporter:
    """Speaks for rank 0; the other ranks hold one that is silent."""

    def __init__(self, *, silent: bool = False) -> None:
        # a log has no width: lines must not be folded at 80 columns
        width = None if sys.stdout.isatty() else 120
        self.console = Console(quiet=silent, highlight=False, width=width, soft_wrap=True)
        self._bar: tuple[Progress, TaskID] | None = None

    @property
    def is_live(self) -> bool:
        """Whether someone is watching."""
        return self.console.is_terminal and not self.console.quiet

    def say(self, text: str) -> None:
        """One line, or several."""
        self.console.print(_plain(text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others are numbers."""
        table = Table(title=_plain(title, "table.title"), title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(_plain(column), justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(_plain, row))
        self.console.print(table)

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
