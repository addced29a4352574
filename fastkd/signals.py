"""SIGINT and SIGTERM, handled by a function of ours while a context is open."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Call `note` with the number of every SIGINT or SIGTERM; the handlers before come back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {
        number: signal.signal(number, lambda given, _frame: note(given)) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
