"""Two machines with a rank each: namespaces of the network, joined by a pair of interfaces."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import assert_same_run, keys, make_recipe, run_command, run_environment
from warm_processes import WarmProcess, start

from fastkd.rank_timeout import TIMEOUT

INTERFACE = "fk0"
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("ip") or "/sbin/ip"
    return subprocess.run([tool, *words], capture_output=True, text=True, timeout=30)


def must(*words: str) -> None:
    done = ip(*words)
    if done.returncode:
        pytest.skip(f"no namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def joined(names: tuple[str, ...]) -> Iterator[None]:
    """Namespaces whose interfaces of one name are the ends of a pair."""
    try:
        for name in names:
            must("netns", "add", name)
        ends = [("name", INTERFACE, "netns", name) for name in names]
        must("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            must("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                must("-n", name, "link", "set", interface, "up")
        yield
    finally:
        # the pair goes with them
        for name in names:
            ip("netns", "del", name)


@pytest.fixture
def nodes() -> Iterator[tuple[str, ...]]:
    if shutil.which("ip") is None and not Path("/sbin/ip").exists():
        pytest.skip("no namespaces here: there is no `ip` (iproute2)")
    if os.geteuid() != 0:
        pytest.skip("no namespaces here: making them takes root")
    names = tuple(f"fastkd-{os.getpid()}-{number}" for number in range(2))
    with joined(names):
        yield names


def start_nodes(names: tuple[str, ...], *arguments: str, **environment: str) -> list[WarmProcess]:
    """A rank on each, with what `torchrun --nnodes 2 --master-addr ...` sets."""
    script = Path(__file__).parent / "helpers" / "on_node.py"
    shared = {
        **run_environment(),
        **environment,
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29511",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    return [
        start([str(script), name, *arguments], {**shared, "RANK": str(rank)})
        for rank, name in enumerate(names)
    ]


def said(nodes: list[WarmProcess], rank: int, timeout: float) -> tuple[int | None, list[str]]:
    text = nodes[rank].communicate(timeout)[1]
    assert "Traceback" not in text, text[-3000:]
    return nodes[rank].returncode, [x for x in text.splitlines() if x.startswith("fastkd: ")]


@contextmanager
def running(
    names: tuple[str, ...], recipe: Path, **environment: str
) -> Iterator[list[WarmProcess]]:
    """Nodes that train without end, and have made two steps."""
    started = start_nodes(names, "distill", str(recipe), "train.steps=100000", **environment)
    try:
        metrics, deadline = recipe.parent / "run" / "metrics.jsonl", time.monotonic() + 100
        while not (metrics.is_file() and '"step": 2' in metrics.read_text()):
            assert time.monotonic() < deadline and started[0].returncode is None
            time.sleep(0.05)
        yield started
    finally:
        for each in started:
            each.end()


def test_two_nodes_train_as_two_ranks_of_one(nodes: tuple[str, ...], tmp_path: Path) -> None:
    """Of streamed text too, whose tokens they send each other."""
    recipe = make_recipe(tmp_path, data={"streaming": True, "shuffle_buffer": 10})
    whole = tmp_path / "whole"
    done = run_command("distill", str(recipe), *keys({"run.output": str(whole)}), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    started = start_nodes(nodes, "distill", str(recipe))
    try:
        for rank in range(2):
            assert said(started, rank, 100) == (0, [])
    finally:
        for each in started:
            each.end()
    assert_same_run(tmp_path / "run", whole, losses=0, weights=0)


def test_a_node_that_dies_ends_the_other(nodes: tuple[str, ...], tmp_path: Path) -> None:
    with running(nodes, make_recipe(tmp_path)) as started:
        started[1].send(signal.SIGKILL)
        code, lines = said(started, 0, 30)
    assert code == 1
    where = f"rank 1 (process {started[1].pid} on {nodes[1]})"
    assert lines == [
        f"fastkd: rank 0 of 2: the connection to another rank was lost ({where}); if it says why "
        "itself, mend that; start all ranks again with --resume to continue"
    ]


def test_a_node_that_is_cut_off_ends_the_other(nodes: tuple[str, ...], tmp_path: Path) -> None:
    """A dead link says nothing: both wait for as long as they were told."""
    with running(nodes, make_recipe(tmp_path), **{TIMEOUT: "5"}) as started:
        assert ip("-n", nodes[1], "link", "set", INTERFACE, "down").returncode == 0
        for rank in range(2):
            code, lines = said(started, rank, 60)
            other = f"rank {1 - rank} (process {started[1 - rank].pid} on {nodes[1 - rank]})"
            assert code == 1
            assert lines == [
                f"fastkd: rank {rank} of 2: no answer in time from {other}; end what hangs and "
                f"start all ranks again with --resume to continue, or raise {TIMEOUT}"
            ]
