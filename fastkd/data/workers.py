"""Processes that call one function, for work that holds the interpreter lock.

They are forked, so that any function works, and fed through pipes by a thread each. They hold
nothing, so they are ended by a kill; signals that ask a run for an end leave them alone, as the run
decides when it needs them no more; and where their process is gone, even by a kill, they find
their pipe closed and end. A process that may have no children, such as one of a
`multiprocessing.Pool`, does the work itself. The road not taken: `ProcessPoolExecutor`, whose
processes outlive a process that is killed, and which waits forever for some that don't heed
SIGTERM.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from fastkd.errors import UserError
from fastkd.variables import variable

A = TypeVar("A")
R = TypeVar("R")


class Workers(Generic[A, R]):
    """A function's calls, each in one of several processes.

    Args:
        function: is called with what is submitted; what it is given and gives is pickled.
        count: processes.
        lost: what to tell a user whose process was killed, and what to do about it.
        refused: likewise, of one that the system does not start.

    Raises:
        UserError: it does not start them.
    """

    def __init__(self, function: Callable[[A], R], count: int, lost: str, refused: str) -> None:
        self._lost = lost
        # what a pool started is daemonic
        self._alone = function if multiprocessing.current_process().daemon else None
        self._refused = refused
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, "fastkd-workers")
        context = multiprocessing.get_context("fork")
        ours: list[Connection] = []
        processes: list[BaseProcess] = []
        # tokenizers warns about a fork after its threads were used, unless told what is wanted
        try:
            with variable("TOKENIZERS_PARALLELISM", "false"):
                for _ in range(0 if self._alone else count):
                    here, there = context.Pipe()
                    ours.append(here)
                    # a copy of our end in a child would keep its pipe open when we are gone
                    process = context.Process(
                        target=_serve, args=(function, there, list(ours)), daemon=True
                    )
                    with there:
                        process.start()
                    processes.append(process)
                    self._idle.put(here)
        except OSError as error:
            _end(self._threads, processes, ours)
            raise UserError(f"{refused} ({error.strerror})") from error
        self._processes = processes
        # before multiprocessing's own, which would wait for who heeds no SIGTERM
        self._end = Finalize(self, _end, (self._threads, processes, ours), exitpriority=10)

    def submit(self, argument: A) -> Future[R]:
        """Call the function; a process that is gone is a `UserError`."""
        if self._alone is None:
            return self._asked(argument)
        # here and now: tokenizers bear no call of another thread meanwhile
        done: Future[R] = Future()
        result, error = _answer(self._alone, argument)
        if error is not None:
            done.set_exception(error)
        else:
            made: Any = result
            done.set_result(made)
        return done

    def _asked(self, argument: A) -> Future[R]:
        try:
            return self._threads.submit(self._ask, argument)
        except RuntimeError as error:
            # a thread counts as a process where these are limited
            if "start new thread" not in str(error):
                raise
            raise UserError(f"{self._refused} ({error})") from error

    def close(self) -> None:
        """End the processes, whatever they do."""
        if self._end.still_active():
            _kill(self._processes)
            # what is being asked fails at once
            self._threads.shutdown(cancel_futures=True)
        self._end()

    def _ask(self, argument: A) -> R:
        worker = self._idle.get()
        try:
            worker.send(argument)
            result, error = worker.recv()
        except (EOFError, OSError) as lost:
            raise UserError(self._lost) from lost
        finally:
            self._idle.put(worker)
        if error is not None:
            raise error
        made: R = result
        return made


def _serve(function: Callable[[Any], Any], pipe: Connection, theirs: list[Connection]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for end in theirs:
        end.close()
    while True:
        try:
            pipe.send(_answer(function, pipe.recv()))
        except (EOFError, OSError):
            # whoever asks is gone, with all that an orderly end would look after
            os._exit(0)


def _answer(function: Callable[[A], R], argument: A) -> tuple[R | None, Exception | None]:
    try:
        return function(argument), None
    # raised where it was asked for
    except Exception as error:
        return None, error


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _end(threads: ThreadPoolExecutor, processes: list[BaseProcess], ours: list[Connection]) -> None:
    """End what nobody asks any more: a call in a thread would hold the `Workers`.

    The garbage collector runs this wherever it likes, also within threading's own locks, so it
    waits for no thread.
    """
    _kill(processes)
    threads.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.join()
    for end in ours:
        end.close()
