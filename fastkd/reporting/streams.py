"""Streams that nobody hears any more: a pipe whose reader has ended, a terminal that was closed."""

from __future__ import annotations

import errno
import os
import stat
from typing import IO


def silence(stream: IO[str]) -> None:
    """Let all go nowhere that is said there, what is buffered and what others print included."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def is_closed_terminal(error: OSError, stream: IO[str]) -> bool:
    """Whether a write failed as its terminal is gone, not as a disk failed."""
    # such a one no longer says that it is a terminal
    return error.errno == errno.EIO and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
