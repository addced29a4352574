"""Which checkpoints stay, and which states fit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastkd.distributed import Ranks
from fastkd.training.checkpoint import Checkpoints
from fastkd.training.checkpoint.layout import Place
from fastkd.training.checkpoint.named_state import load_named_state, make_states, named_state


class _Alone(Ranks):
    """A rank without a process group."""

    def barrier(self) -> None:
        pass


_ALONE = _Alone(0, 1, torch.device("cpu"))


def _engine(width: int = 2, *, bias: bool = True) -> Any:
    """As much of DeepSpeed's at stage 0 as saving asks for."""
    module = torch.nn.Linear(width, 2, bias=bias)
    optimizer = torch.optim.AdamW(module.parameters())
    return SimpleNamespace(
        module=module,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
        global_steps=1,
        global_samples=1,
        skipped_steps=0,
        zero_optimization_stage=lambda: 0,
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """Of steps 2 and 4."""
    found = Checkpoints(tmp_path / "checkpoints", _ALONE, 2)
    for step in (2, 4):
        found.save(_engine(), step, {"step": step})
    return found


def _there(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoints.folder.glob("step-*"))


def _flip(checkpoints: Checkpoints, step: int) -> None:
    path = checkpoints.folder / f"step-{step:08d}" / "training.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_newest_stay(checkpoints: Checkpoints) -> None:
    checkpoints.save(_engine(), 6, {})
    assert _there(checkpoints) == [4, 6]
    checkpoints.keep = 1
    checkpoints.save(_engine(), 123_456_789, {})
    assert _there(checkpoints) == [123_456_789]
    assert (checkpoints.folder / "latest").read_text() == "step-123456789"


def test_a_damaged_one_that_is_newer_does_not_push_out_the_one_just_written(
    checkpoints: Checkpoints,
) -> None:
    _flip(checkpoints, 4)
    said: list[str] = []
    assert checkpoints.newest(said.append) == "step-00000002" and len(said) == 1
    checkpoints.keep = 1
    checkpoints.save(_engine(), 3, {})
    assert _there(checkpoints) == [3]
    assert checkpoints.newest(said.append) == "step-00000003" and len(said) == 1


def test_a_damaged_one_that_is_older_does_not_count(checkpoints: Checkpoints) -> None:
    _flip(checkpoints, 4)
    assert checkpoints.newest() == "step-00000002"
    checkpoints.save(_engine(), 6, {})
    assert _there(checkpoints) == [2, 6]
    # written anew it counts again
    for step in (4, 6):
        checkpoints.save(_engine(), step, {})
    assert _there(checkpoints) == [4, 6]


def test_what_stands_in_the_place_of_a_checkpoint_makes_room(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    moved = Path(shutil.move(checkpoints.folder / "step-00000004", tmp_path / "moved"))
    (checkpoints.folder / "step-00000004").symlink_to(moved)
    (checkpoints.folder / "step-00000006").write_text("a file")
    (checkpoints.folder / "step-of-mine").mkdir()
    (checkpoints.folder / ".latest.1234").write_text("of a process that was killed")
    assert checkpoints.newest() == "step-00000002"
    checkpoints.save(_engine(), 6, {})
    checkpoints.save(_engine(), 8, {})
    assert checkpoints.newest() == "step-00000008"
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["latest", "step-00000006", "step-00000008", "step-of-mine"]
    assert (moved / "manifest.json").is_file()


def test_random_numbers_go_on_where_there_were_some(checkpoints: Checkpoints) -> None:
    """And start anew on further ranks: the same each time, others on each."""
    torch.manual_seed(3)
    random.seed(3)
    checkpoints.save(_engine(), 6, {})
    there = [*torch.rand(2).tolist(), random.random()]

    def drawn(rank: int, seed: int) -> list[float]:
        found = Checkpoints(checkpoints.folder, Ranks(rank, 3, torch.device("cpu")), 2)
        found._restore_random_state(found.folder / "step-00000006", 1, seed)
        return [*torch.rand(2).tolist(), random.random()]

    assert drawn(0, 1) == drawn(0, 2) == there
    new = [drawn(rank, seed) for rank, seed in ((1, 1), (2, 1), (1, 2))]
    assert drawn(1, 1) == new[0] and len({tuple(draws) for draws in (there, *new)}) == 4


def test_the_state_of_another_model_is_refused() -> None:
    state = named_state(_engine(), _ALONE)
    for engine, said in (
        (_engine(3), r"weight of weight is \[2, 2\], expected \[2, 3\]"),
        (_engine(bias=False), "it has a parameter more: bias"),
    ):
        before = [weight.clone() for weight in engine.module.parameters()]
        with pytest.raises(ValueError, match=said):
            load_named_state(engine, state, _ALONE)
        assert all(map(torch.equal, before, engine.module.parameters()))
    with pytest.raises(ValueError, match="it has no parameter bias"):
        load_named_state(_engine(), named_state(_engine(bias=False), _ALONE), _ALONE)


def test_steps_that_differ_in_a_group_are_refused() -> None:
    """A flat group has one number of steps; alone, a parameter without a gradient makes none."""
    flat = torch.zeros(4)
    optimizer = torch.optim.AdamW([flat])
    places = {name: Place(flat, optimizer, 0, 2, start) for name, start in (("a", 0), ("b", 2))}
    moments = {key: torch.ones(2) for key in ("weight", "exp_avg", "exp_avg_sq")}
    steps = [{**moments, "step": torch.tensor(float(step))} for step in (3, 5)]
    with pytest.raises(ValueError, match=r"different numbers of steps \(a 3, b 5\)"):
        make_states(places, dict(zip("ab", steps, strict=True)))
    optimizer.state.clear()
    make_states(places, {"a": steps[0], "b": {"weight": torch.ones(2)}})
    assert optimizer.state[flat]["step"] == 3 and optimizer.state[flat]["exp_avg"].shape == (4,)
