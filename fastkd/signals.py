"""SIGINT, SIGTERM and SIGHUP, handled by a function of ours while a context is open."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a process for an end."""


class Signalled(BaseException):
    """A signal asks this process to end; no `Exception`, which a library might take for its own."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)


@contextmanager
def stop_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Call `note` with the number of every signal that asks for an end; the handlers before come
    back. Forked children die of them as they would anywhere. Python lets the main thread alone
    handle signals: in another one nothing is called, and they do what they did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == owner:
            note(number)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    previous = {}
    for number in STOPPING:
        # nohup ignores it, and means so
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_raised() -> Iterator[None]:
    """Raise `Signalled` wherever the first signal finds the process; the next one ends it."""

    def note(number: int) -> None:
        for each in STOPPING:
            if signal.getsignal(each) != signal.SIG_IGN:
                signal.signal(each, signal.SIG_DFL)
        raise Signalled(number)

    with stop_signals(note):
        yield
