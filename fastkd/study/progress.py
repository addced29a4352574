"""What a user sees while a study runs: a live bar on a terminal, a line a run in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import Progress, TaskID

from fastkd.errors import printable
from fastkd.reporting.console import Reporter
from fastkd.reporting.progress import live_bar
from fastkd.study.results import Results
from fastkd.study.runner import Runner
from fastkd.study.storage import Store

# reading the storage is cheap, drawing it ten times a second is not
_REFRESH_SECONDS = 2.0


class Watcher:
    """Says what the workers say, how far the study is, and which condition leads."""

    def __init__(self, store: Store, runner: Runner, reporter: Reporter) -> None:
        self.store, self.runner, self.reporter = store, runner, reporter
        self._bar: tuple[Progress, TaskID] | None = None
        self._first, _ = store.run_counts()
        self._next = 0.0
        self._said_best = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show a bar while the context is open, where someone is watching."""
        if not self.reporter.is_live:
            yield
            return
        with live_bar("study", self.reporter.console) as progress:
            done, total = self.store.counts()
            self._bar = progress, progress.add_task("", total=total, completed=done)
            try:
                yield
            finally:
                self._bar = None

    def look(self) -> None:
        """Pass on what was said since the last look."""
        news: list[str] = []
        while not self.runner.said.empty():
            news.append(self.runner.said.get())
        done, total = self.store.counts() if news else (0, 0)
        for text in news:
            self.reporter.say(text if self._bar else f"{done}/{total}  {text}")
        if not news and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _REFRESH_SECONDS
        best = self._best()
        if self._bar:
            progress, task = self._bar
            done, total = self.store.counts()
            text = "  ".join(part for part in (self._remaining(), best) if part)
            progress.update(task, completed=done, total=total, description=printable(text))
        elif best != self._said_best:
            self._said_best = best
            self.reporter.say("  ".join(part for part in (best, self._remaining()) if part))

    def _remaining(self) -> str:
        done, total = self.store.run_counts()
        made = done - self._first - self.runner.found
        if made <= 0 or self.runner.began is None:
            return ""
        seconds = (time.monotonic() - self.runner.began) / made * (total - done)
        minutes = round(seconds / 60)
        if minutes < 2:
            return f"{seconds:.0f} s left"
        return f"{minutes} min left" if minutes < 120 else f"{minutes / 60:.1f} h left"

    def _best(self) -> str:
        best = Results(self.store.plan, self.store.records()).best()
        return f"best so far {best[0]}: {best[1]}" if best else ""
