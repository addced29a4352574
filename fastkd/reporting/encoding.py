"""Names that the encoding of stdout has no characters for: they are written out, not fatal.

A locale without UTF-8 or PYTHONIOENCODING=ascii is enough, and the name is a folder's, a label's or
a task's. Python itself writes such characters out on stderr, and on stdout raises.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# who chose another way, as in PYTHONIOENCODING=ascii:replace, keeps it
_RAISING = ("strict", "surrogateescape")


@contextmanager
def all_names_said() -> Iterator[None]:
    """Write characters that stdout can't encode as escapes, `\\xe9`, while the context is open."""
    stream = sys.stdout
    # what a notebook or a live bar puts in its place encodes by itself
    if not isinstance(stream, io.TextIOWrapper) or stream.closed or stream.errors not in _RAISING:
        yield
        return
    errors = stream.errors
    _set(stream, "backslashreplace")
    try:
        yield
    finally:
        if not stream.closed:
            _set(stream, errors)


def _set(stream: io.TextIOWrapper, errors: str) -> None:
    # what fails to be written is an error here as anywhere
    stream.flush()
    # a pipe that `dup2` put in the place of a file is asked for its position once all is set
    with suppress(OSError):
        stream.reconfigure(errors=errors)
