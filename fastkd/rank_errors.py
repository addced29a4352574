"""Which of several ranks says a mistake: one that all meet is said once, any other by who meets it.

Ranks learn of each other's mistakes from the store that they met at: who waits in a collective for
what another one has to say would wait for a rank that is at work.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from fastkd.distributed import Ranks
from fastkd.errors import LostRank, RankError, SharedError, UserError
from fastkd.signals import stop_signals

_WAIT_SECONDS = 3.0
"""For the first rank to meet the same mistake."""
_LOOK_SECONDS = 0.05
# of this process, as of all others: mistakes of an earlier one are none of the next
_sessions = count()


@contextmanager
def said_once() -> Iterator[Callable[[Ranks], None]]:
    """Let each mistake of several ranks be said by one of them.

    The first rank says its own. Another one says what the first does not meet within seconds, and
    of ranks of a machine that meet the same the first to come.

    Yields:
        What takes the ranks, once they have met; before that nothing is changed.

    Raises:
        SharedError: a mistake that the first rank, or another one of this machine, says.
        RankError: one that this rank, which is not the first, has to say; it names the rank.
    """
    mistakes: list[_Mistakes] = []

    def meet(ranks: Ranks) -> None:
        if ranks.world_size > 1:
            mistakes.append(_Mistakes(ranks.rank, ranks.world_size, next(_sessions)))

    try:
        yield meet
    except UserError as error:
        if not mistakes:
            raise
        (noted,) = mistakes
        # a launcher ends all ranks once one has ended, and what this one met would not be said
        with stop_signals(lambda _number: None):
            said = noted.is_said(str(error))
        if noted.rank == 0 or isinstance(error, SharedError):
            raise
        if said:
            raise SharedError(str(error)) from error
        raise RankError(f"rank {noted.rank}: {error}") from error
    except LostRank:
        # it says another thing than the first rank, which need not wait for it
        for noted in mistakes:
            noted.leave()
        raise


class _Mistakes:
    """What the ranks of a session have to say."""

    def __init__(self, rank: int, size: int, session: int) -> None:
        self.rank = rank
        self._others = size - 1
        self._key = f"fastkd-mistake-{session}"
        self._left = f"{self._key}-left"
        # lives on where the group is left
        self._store: Any = distributed_c10d._get_default_store()

    def is_said(self, message: str) -> bool:
        """Note a mistake of this rank; whether another one says it."""
        return self._asked(self._tell if self.rank == 0 else self._listen, message)

    def leave(self) -> None:
        """Note that this rank asks no more."""
        self._asked(self._count)

    def _asked(self, function: Callable[..., bool], *given: str) -> bool:
        """What the store says, or false where it says nothing."""
        answer: list[bool] = []

        def ask() -> None:
            # where the first rank keeps the store, that goes with it
            with suppress(dist.DistError):
                answer.append(function(*given))

        # a store behind a link that is cut never answers
        asking = threading.Thread(target=ask, name="fastkd-mistake", daemon=True)
        asking.start()
        asking.join(_WAIT_SECONDS + 1)
        return answer == [True]

    def _tell(self, message: str) -> bool:
        """Of the first rank, with which its store goes unless the launcher keeps that."""
        self._store.set(self._key, message)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _within(lambda: self._store.add(self._left, 0) >= self._others)
        return False

    def _listen(self, message: str) -> bool:
        """Of any other rank."""
        said = False
        if _within(lambda: self._store.check([self._key])):
            said = self._store.get(self._key).decode() == message
        if not said:
            of = hashlib.sha256(message.encode(errors="replace")).hexdigest()
            said = self._store.add(f"{self._key}-{socket.gethostname()}-{of}", 1) > 1
        self._count()
        return said

    def _count(self) -> bool:
        return bool(self._store.add(self._left, 1))


def _within(is_there: Callable[[], bool]) -> bool:
    """Whether something comes while a rank waits for another one."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not is_there():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True
