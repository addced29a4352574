"""The process group: made anew in one process, and what of it only GPUs would show."""

from __future__ import annotations

import errno
import json
import os
import socket
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_model
from tiny_runs import make_recipe, run_script

from fastkd import distributed
from fastkd.distributed import joined_ranks, start_ranks
from fastkd.errors import LostRank, RankError, UserError
from fastkd.rank_timeout import TIMEOUT
from fastkd.recipe import Recipe, load_recipe
from fastkd.training.engine import shard_teacher

NO_INTERFACE = "[enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find {}"


def test_a_second_group_reads_nothing_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun the store is the launcher's, and is there for both."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv(TIMEOUT, "20")
    done = run_script("two_groups.py", ranks=2, port=store.port)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["turn 0: 3", "turn 1: 3"]


def test_one_process_needs_no_interface_of_a_launchers_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    with joined_ranks() as ranks:
        assert ranks.world_size == 1 and dist.get_backend() == "gloo"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("said", "name", "expected"),
    [
        (NO_INTERFACE.format("interface for: [127.0.0.1]"), None, r"127.*\(ip link set lo up\)$"),
        (NO_INTERFACE.format("address for: ib0"), "ib0", r"GLOO_SOCKET_IFNAME is 'ib0': give an"),
        (os.strerror(errno.EAGAIN), None, r"could start no thread .*\(ulimit -u is -?\d+\)$"),
        ("other", None, "^other$"),
    ],
)
def test_what_gloo_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, said: str, name: str | None, expected: str
) -> None:
    def begin(*_given: Any, **_options: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(dist, "init_process_group", begin)
    if name is not None:
        # as torchrun starts ranks
        for key, value in {"RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": name}.items():
            monkeypatch.setenv(key, value)
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(key, "1")
        store = dist.HashStore()  # type: ignore[attr-defined]
        monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    kind = RuntimeError if said == "other" else RankError
    with pytest.raises(kind, match=expected), joined_ranks():
        pass


def test_what_one_rank_raises_ends_the_run_on_every_rank(tmp_path: Path) -> None:
    """At one step, so that the group of a script's own goes on in step: the ranks' sum is 3."""
    train = {"steps": 4, "checkpoint_every": 1}
    recipe = make_recipe(tmp_path, train=train, run={"output": str(tmp_path / "run"), "lean": True})
    done = run_script("raising_ranks.py", str(recipe), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    said = {k: v for line in done.stdout.splitlines() for k, v in json.loads(line).items()}
    run, one = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000001"
    full = "writing failed (No space left on device); what was finished before is whole: free some"
    teacher = f"SharedError: rank 1: teacher.model {tmp_path / 'teacher'}: not loadable ([Errno 28]"
    recipe_read = f"SharedError: rank 1: {run}/recipe.yaml: not a readable recipe ([Errno 28]"
    both = [
        f"SharedError: {place}: {full} space and continue with --resume"
        for place in (run, f"rank 1: {one}", one, one)
    ]
    first, second = "KeyError: 'pruned'", "UserError: bad"
    for found in said.values():
        for place, expected in ((0, teacher), (-1, recipe_read)):
            read, total = found.pop(place)
            assert read.startswith(expected) and total == 3.0
    assert said["0"] == [[each, 3.0] for each in (*both, first, second, "")]
    raised = f"SharedError: rank 0's on_step raised {first}"
    judged = f"SharedError: rank 0's on_evaluate raised {second}"
    assert said["1"] == [[each, 3.0] for each in (*both, raised, judged, "")]


def test_who_waits_for_other_ranks_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first that is here speaks for all that are; in a script others may never come."""
    monkeypatch.setattr(distributed, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(distributed, "_groups", repeat(7))
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    for rank, late in ((1, r"rank 0, rank 2"), (0, "rank 2")):
        with pytest.raises(LostRank, match=f"rank {rank} of 3: {late} not there after .* every"):
            distributed._all_here(store, rank, 3, timedelta(seconds=0.2))
    distributed._all_here(store, 2, 3, timedelta(seconds=0.2))
    said = [line.partition("; every rank must")[0] for line in capsys.readouterr().err.splitlines()]
    waits = "fastkd: rank {} waits for {} of 3 ranks ({})"
    assert said == [waits.format(1, 2, "rank 0, rank 2"), waits.format(0, 1, "rank 2")]


def test_ranks_that_do_not_meet_are_a_lost_rank(
    two_gpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_given: Any, **_named: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:152] x")

    monkeypatch.setattr(dist, "init_process_group", gone)
    with pytest.raises(LostRank, match=r"rank 1 of 2: the ranks can't meet \(Gloo .* x\); if"):
        start_ranks()
    assert "backend" not in two_gpus


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """This process as the second of two ranks of NCCL, each of which is shown one GPU; what it
    asks for."""
    asked: dict[str, Any] = {"ended": 0}
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    gpu = SimpleNamespace(uuid="GPU-1")
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": gpu,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_given, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))

    def begun(backend: str, **given: Any) -> None:
        asked.update(backend=backend, **given)
        for name, value in {
            "is_initialized": True,
            "get_rank": 1,
            "get_world_size": 2,
            "get_backend": "nccl",
        }.items():
            monkeypatch.setattr(dist, name, lambda value=value: value)

    monkeypatch.setattr(dist, "init_process_group", begun)
    monkeypatch.setattr(distributed, "meet", lambda: ())
    monkeypatch.setattr(distributed, "_groups", iter([7]))
    ended: Any = lambda: asked.update(ended=asked["ended"] + 1)  # noqa: E731
    monkeypatch.setattr(distributed, "stop_ranks", ended)
    first = dist.PrefixStore("fastkd-7", store)  # type: ignore[attr-defined]
    first.set("here/0", "")
    first.set("gpu/0", f"{socket.gethostname()} GPU-0")
    asked["first"] = first
    return asked


def test_the_one_gpu_that_a_rank_is_shown_is_its_own(two_gpus: dict[str, Any]) -> None:
    ranks = start_ranks()
    assert (ranks.rank, ranks.world_size, ranks.device) == (1, 2, torch.device("cuda", 0))
    assert two_gpus["device"] == ranks.device and os.environ["LOCAL_RANK"] == "0"
    asked = two_gpus["backend"], two_gpus["rank"], two_gpus["world_size"]
    assert asked == ("nccl", 1, 2)


def test_two_ranks_of_one_gpu_are_refused(two_gpus: dict[str, Any]) -> None:
    two_gpus["first"].set("gpu/0", f"{socket.gethostname()} GPU-1")
    with pytest.raises(RankError, match=r"ranks 0, 1 have one GPU of .*, expected one"):
        start_ranks()
    assert "backend" not in two_gpus


def test_who_fails_alone_does_not_wait_for_the_others(two_gpus: dict[str, Any]) -> None:
    """NCCL leaves a group only together."""
    with pytest.raises(UserError, match="a mistake"), joined_ranks():
        raise UserError("a mistake")
    assert two_gpus["ended"] == 0


def test_all_leave_the_group_at_the_end(two_gpus: dict[str, Any]) -> None:
    with joined_ranks():
        pass
    assert two_gpus["ended"] == 1


def test_a_teacher_in_shards_is_never_moved_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be larger than a GPU."""
    recipe = load_recipe(make_recipe(tmp_path), ["teacher.placement=shard"])
    assert isinstance(recipe, Recipe)
    model, ids = tiny_model("bert"), torch.arange(5, 13)[None]
    expected = model(ids).last_hidden_state

    def moved(*_arguments: Any, **_keywords: Any) -> None:
        raise AssertionError("all of it was moved")

    monkeypatch.setattr(type(model), "to", moved)
    with joined_ranks(), torch.no_grad():
        engine = shard_teacher(model.requires_grad_(False), recipe)
        # which returns nothing
        engine.eval()
        assert torch.equal(engine(ids).last_hidden_state, expected)
