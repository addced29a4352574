"""A signal at any moment and a rank that is lost: one line, and how to go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import make_recipe, run_environment, run_script
from warm_processes import start_ranks

from fastkd.distributed import Peer, lost_ranks
from fastkd.errors import LostRank, UserError
from fastkd.rank_timeout import TIMEOUT, rank_timeout
from fastkd.signals import Signalled, signals_raised, stop_signals

AGAIN = "if it says why itself, mend that; start all ranks again with --resume to continue"
LOADING = ("SIGINT while models load", "SIGTERM while models load", "SIGHUP while data loads")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path)


def last_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("fastkd: ")]


@pytest.mark.parametrize("moment", [*LOADING, "SIGTERM in the export"])
def test_a_signal_outside_the_steps_is_one_line(moment: str, recipe: Path) -> None:
    done = run_script("disturbed_run.py", moment, "0", str(recipe), "train.steps=3")
    assert done.returncode == 130, done.stderr[-2000:]
    assert last_lines(done.stderr) == [
        f"fastkd: stopped by {moment.split()[0]}; continue with --resume"
    ]
    assert "Traceback" not in done.stderr and "Abort" not in done.stderr
    run = recipe.parent / "run"
    if moment in LOADING:
        assert not run.exists()
    else:
        assert (run / "checkpoints" / "step-00000003" / "manifest.json").is_file()
        assert not (run / "student").exists() and not list(run.glob(".*"))


def test_a_terminal_that_closes_stops_as_ctrl_c_does(recipe: Path) -> None:
    done = run_script("disturbed_run.py", "SIGHUP in step 3", "0", str(recipe))
    assert done.returncode == 130, done.stderr[-2000:]
    assert last_lines(done.stderr) == ["fastkd: stopped after step 3; continue with --resume"]


def test_handlers_come_back_and_nohup_is_left_alone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seen: list[int] = []
        with stop_signals(seen.append):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        term = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Signalled, match="SIGTERM"), signals_raised():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is term
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_child_dies_of_a_signal_without_a_word() -> None:
    with signals_raised():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM


class Pair:
    """Two ranks without a launcher, which would end the second one where the first one is lost."""

    def __init__(self, moment: str, victim: int, recipe: Path, **environment: str) -> None:
        script = Path(__file__).parent / "helpers" / "disturbed_run.py"
        command = [str(script), moment, str(victim), str(recipe)]
        self.ranks = start_ranks(command, {**run_environment(), **environment}, 2)

    def said(self, rank: int) -> tuple[int | None, str]:
        """Exit code and stderr of a rank."""
        text = self.ranks[rank].communicate(timeout=200)[1]
        return self.ranks[rank].returncode, text

    def end(self) -> None:
        """Kill what is left."""
        for rank in self.ranks:
            rank.end()


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    started: list[Pair] = []
    yield started
    for pair in started:
        pair.end()


@pytest.mark.parametrize(
    ("moment", "victim"), [("between two checkpoints", 1), ("killed while models load", 0)]
)
def test_the_rank_that_is_left_says_which_one_is_gone(
    moment: str, victim: int, recipe: Path, pairs: list[Pair]
) -> None:
    pairs.append(pair := Pair(moment, victim, recipe))
    code, text = pair.said(1 - victim)
    gone = f"rank {victim} (process {pair.ranks[victim].pid} on {socket.gethostname()}) is gone"
    assert last_lines(text) == [f"fastkd: rank {1 - victim} of 2: {gone}; {AGAIN}"], text[-3000:]
    assert code == 1
    assert "Traceback" not in text
    assert pair.said(victim)[0] == -signal.SIGKILL


def test_a_stuck_rank_is_waited_for_as_long_as_one_says(recipe: Path, pairs: list[Pair]) -> None:
    pairs.append(pair := Pair("stuck in step 3", 1, recipe, **{TIMEOUT: "15"}))
    code, text = pair.said(0)
    assert code == 1 and "Traceback" not in text, text[-3000:]
    (said,) = last_lines(text)
    assert f"no answer in time from rank 1 (process {pair.ranks[1].pid} on" in said
    assert "--resume" in said and TIMEOUT in said


def test_a_rank_that_works_alone_learns_that_another_is_gone(
    recipe: Path, pairs: list[Pair]
) -> None:
    """It stands in no collective that would fail."""
    pairs.append(pair := Pair("alone in step 3", 0, recipe))
    metrics, deadline = recipe.parent / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.is_file() and '"step": 2' in metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    pair.ranks[1].send(signal.SIGKILL)
    start = time.monotonic()
    code, text = pair.said(0)
    assert time.monotonic() - start < 30
    gone = f"rank 1 (process {pair.ranks[1].pid} on {socket.gethostname()}) is gone"
    assert last_lines(text) == [f"fastkd: rank 0 of 2: {gone}; {AGAIN}"], text[-3000:]
    assert code == 1 and "Traceback" not in text


def test_containers_count_their_own_processes() -> None:
    """A number that stands for another process there is no sign that a rank is gone."""
    host = socket.gethostname()
    assert Peer(1, 2**30, host).is_gone and Peer(1, 2**30, host, "elsewhere").is_gone is None


def test_who_is_gone_is_seen() -> None:
    host = socket.gethostname()
    child = subprocess.Popen([sys.executable, "-c", ""])
    peer = Peer(1, child.pid, host)
    deadline = time.monotonic() + 30
    # not waited for, it is a zombie
    while not peer.is_gone and time.monotonic() < deadline:
        time.sleep(0.05)
    assert peer.is_gone
    child.wait()
    assert peer.is_gone and Peer(1, os.getpid(), host).is_gone is False
    assert Peer(1, child.pid, "elsewhere").is_gone is None


def test_errors_that_are_no_lost_rank_pass() -> None:
    peers = (Peer(0, os.getpid(), "here"), Peer(1, 1, "elsewhere"))
    for error in (RuntimeError("shape mismatch"), UserError("x"), Signalled(signal.SIGINT)):
        with pytest.raises(type(error)), lost_ranks(peers, 0):
            raise error
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    with pytest.raises(RuntimeError, match="Connection closed"), lost_ranks((), 0):
        raise closed
    lost = pytest.raises(LostRank, match=r"connection to another rank was lost \(rank 1")
    with lost, lost_ranks(peers, 0):
        raise closed
    # whose errors may be of something else
    refused = RuntimeError("NCCL error in: x.cpp:1,\nunhandled cuda error: out of memory")
    lost = pytest.raises(LostRank, match=r"lost \(.*\) \(NCCL .*, unhandled .* out of memory\); if")
    with lost, lost_ranks(peers, 0):
        raise refused


@pytest.mark.parametrize("given", ["", "soon", "-1", "0", "nan", "inf", "1e99"])
def test_a_timeout_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, given)
    with pytest.raises(UserError, match="expected a number of seconds"):
        rank_timeout()
