"""Streams that say nothing: a pipe whose reader has ended, a terminal that was closed, and what a
caller has put in the place of stdout and stderr: none, closed ones, and objects that can do little
more than `write`. What is said there goes nowhere and ends nothing."""

from __future__ import annotations

import errno
import io
import os
import stat
from typing import IO, Any

from rich.console import Console


def silence(stream: IO[str]) -> None:
    """Let all go nowhere that is said there, what is buffered and what others print included."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def _is_closed_terminal(error: OSError, stream: IO[str]) -> bool:
    """Whether a write failed as its terminal is gone, not as a disk failed."""
    # such a one no longer says that it is a terminal
    return error.errno == errno.EIO and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)


class LastingConsole(Console):
    """Falls silent where its reader ends, as `head` and `less` do, or its terminal or stream is
    closed, also in between: what it tells of goes on."""

    @property
    def file(self) -> IO[str]:
        """What is written to now."""
        found = super().file
        return io.StringIO() if getattr(found, "closed", False) else found

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(self.file)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if not _is_closed_terminal(error, self.file):
                # or the disk of the run would be said to be full
                named = str(getattr(self.file, "name", "stdout"))
                raise OSError(error.errno, error.strerror, named) from error
            self.on_broken_pipe()


def is_terminal(stream: Any) -> bool:
    """Whether someone watches a stream; what can't say so is no terminal."""
    if not hasattr(stream, "isatty") or getattr(stream, "closed", False):
        return False
    return bool(stream.isatty())
