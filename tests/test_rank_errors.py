"""Which of several ranks says a mistake."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fastkd import cli, rank_errors
from fastkd.distributed import Ranks
from fastkd.errors import DiskError, LostRank, RankError, SharedError, UserError
from fastkd.rank_errors import said_once


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One session of ranks that meet in this process, one after the other."""
    made: Any = dist.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: made)
    monkeypatch.setattr(rank_errors, "_sessions", repeat(0))
    monkeypatch.setattr(rank_errors, "_WAIT_SECONDS", 0.2)
    return made


def met_by(rank: int, error: UserError, size: int = 4) -> UserError:
    """What a mistake of a rank becomes."""
    with pytest.raises(UserError) as raised, said_once() as meet:
        meet(Ranks(rank, size, torch.device("cpu")))
        raise error
    return raised.value


def test_a_mistake_of_all_is_said_by_the_first(store: Any) -> None:
    error = UserError("no such teacher")
    assert met_by(0, error) is error
    for rank in (1, 2):
        assert type(met_by(rank, UserError("no such teacher"))) is SharedError


@pytest.mark.parametrize("first", [None, "another one"])
def test_a_mistake_that_the_first_does_not_meet_is_said_once(store: Any, first: str | None) -> None:
    if first is not None:
        met_by(0, UserError(first))
    said = met_by(2, DiskError("no such text"))
    assert type(said) is RankError and str(said) == "rank 2: no such text"
    assert type(met_by(3, DiskError("no such text"))) is SharedError
    assert str(met_by(1, UserError("no space"))) == "rank 1: no space"


def test_the_first_waits_for_who_still_asks(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store goes with it, unless it is the launcher's."""
    monkeypatch.setattr(rank_errors, "_WAIT_SECONDS", 20.0)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(met_by, 0, UserError("no text"), 3)
        assert type(met_by(1, UserError("no text"), 3)) is SharedError
        assert not first.done()
        with pytest.raises(LostRank), said_once() as meet:
            meet(Ranks(2, 3, torch.device("cpu")))
            raise LostRank("rank 0 is gone")
        assert type(first.result(timeout=10)) is UserError
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    start = time.monotonic()
    met_by(0, UserError("no space"), 8)
    assert time.monotonic() - start < 10


def test_every_machine_says_its_own(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sits before one doesn't see what another one says."""
    for number, host in enumerate(("here", "there"), start=1):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert str(met_by(number, UserError("no text"))) == f"rank {number}: no text"


def test_what_was_sent_to_all_is_left_to_the_first(store: Any) -> None:
    error = SharedError("a folder is taken")
    assert met_by(3, error) is error


def test_one_process_says_what_it_meets() -> None:
    error = UserError("no such teacher")
    assert met_by(0, error, size=1) is error
    with pytest.raises(UserError) as raised, said_once():
        raise error
    assert raised.value is error


def test_a_store_that_is_gone_keeps_nobody_from_speaking(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(distributed_c10d, "_get_default_store", Gone)
    assert str(met_by(1, UserError("no text"))) == "rank 1: no text"


def ended(monkeypatch: pytest.MonkeyPatch, error: Exception, **environment: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def failing(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 2


@pytest.mark.parametrize(
    ("error", "rank", "local", "said"),
    [
        (UserError("bad key"), "0", "0", "fastkd: bad key\n"),
        (UserError("bad key"), "1", "1", ""),
        # whose terminal shows nothing of the first
        (UserError("no recipe"), "8", "0", "fastkd: rank 8: no recipe\n"),
        (RankError("rank 9: no text"), "9", "1", "fastkd: rank 9: no text\n"),
        (SharedError("taken"), "0", "0", "fastkd: taken\n"),
        (SharedError("taken"), "8", "0", ""),
    ],
)
def test_who_prints(
    error: Exception,
    rank: str,
    local: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended(monkeypatch, error, RANK=rank, LOCAL_RANK=local)
    assert capsys.readouterr().err == said
