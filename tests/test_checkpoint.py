"""What is in a checkpoint comes back bit for bit, at every stage, and runs no code."""

from __future__ import annotations

import json
import os
import pickle
import random
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import keys, make_recipe, read_losses, read_weights, run_script
from torch import Tensor

from fastkd.files.sealed import look_at
from fastkd.training.checkpoint.states import (
    NotAState,
    check_state,
    opened_state,
    read_state,
    write_state,
)

OFFLOADED = {"deepspeed.zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
SHARDED = {"deepspeed.zero_optimization": {"stage3_param_persistence_threshold": 0}}
# ranks, whether the newest checkpoint is damaged, overrides; ZeRO-3 changes the process, so is last
VARIANTS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "stage 0": (1, False, {"train.zero_stage": 0}),
    "stage 2, bf16": (1, True, {"train.zero_stage": 2, "train.precision": "bf16"}),
    "stage 1, offloaded": (1, False, {"train.zero_stage": 1, **OFFLOADED}),
    "2 ranks, stage 1, bf16": (2, True, {"train.precision": "bf16"}),
    "2 ranks, stage 3": (2, True, {"train.zero_stage": 3, **SHARDED}),
}
TREE: dict[str, Any] = {
    "none": None,
    "numbers": [1, 2**70, -0.0, 0.1, float("inf"), True],
    "state": {0: {"step": torch.tensor(3.0)}, 1: ()},
    "nested": ("text \N{SNOWMAN}", [(1, (2.5, None))], {}),
    "tensors": [
        torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        torch.arange(6).view(2, 3).T,
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.uint8),
        torch.tensor(2.0, dtype=torch.float64),
    ],
}


def _open(path: Path) -> None:
    with opened_state(path):
        pass


READERS = (read_state, check_state, _open)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The resumed run of every variant, and what its process said."""
    folder = tmp_path_factory.mktemp("variants")
    student = {"layers": 2, "hidden_size": 24, "intermediate_size": 48, "dropout": 0.1}
    train = {"steps": 5, "checkpoint_every": 1, "batch_size": 8, "learning_rate": 1e-3}
    recipe = make_recipe(folder, student=student, train=train)
    outputs = {name: folder / name.replace(" ", "-").replace(",", "") for name in VARIANTS}
    found = {}
    for ranks in (1, 2):
        mine = {name: variant for name, variant in VARIANTS.items() if variant[0] == ranks}
        batches = [
            [damaged, *keys({"run.output": str(outputs[name]), **values})]
            for name, (_, damaged, values) in mine.items()
        ]
        done = run_script("resumed_variants.py", str(recipe), json.dumps(batches), ranks=ranks)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found |= {name: (outputs[name], done.stdout) for name in mine}
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_is_bit_identical(runs: dict[str, tuple[Path, str]], name: str) -> None:
    run, said = runs[name]
    whole = run.with_name(f"{run.name}-whole")
    mine, theirs = read_weights(run), read_weights(whole)
    assert all(weight.equal(theirs[key]) for key, weight in mine.items())
    assert read_losses(run) == read_losses(whole)
    damaged = VARIANTS[name][1]
    step = 2 if damaged else 3
    assert f"continuing from {run}/checkpoints/step-{step:08d}" in said
    assert (f"{run}/checkpoints/step-{3:08d} is damaged" in said) == damaged


def test_files_are_safetensors_with_the_permissions_of_the_umask(
    runs: dict[str, tuple[Path, str]],
) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for run, _ in runs.values():
        for folder in (run / "checkpoints").glob("step-*"):
            names = [path.name for path in folder.iterdir()]
            assert all(name.endswith((".safetensors", "manifest.json")) for name in names)
            for path in folder.iterdir():
                assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
                if path.suffix == ".safetensors":
                    load_file(path)
        assert not list(run.rglob("*.py")) and not list(run.rglob("*.pt"))


def _assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            _assert_same(mine, theirs)
    else:
        assert repr(one) == repr(other)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    tree = {**TREE, "random": random.getstate(), "torch": torch.get_rng_state()}
    written = write_state(path, tree)
    assert written == look_at(path)
    check_state(path)
    _assert_same(read_state(path), tree)


def test_a_tensor_that_stands_twice_is_stored_once(tmp_path: Path) -> None:
    shared = torch.randn(1000)
    one = write_state(tmp_path / "one", {"a": shared})
    two = write_state(tmp_path / "two", {"a": shared, "b": shared, "c": shared[:10]})
    assert two.size - one.size < 400
    _assert_same(read_state(tmp_path / "two"), {"a": shared, "b": shared, "c": shared[:10]})


@pytest.mark.parametrize("value", [object(), {1.5: 0}, torch.float32, {(): 0}, {True: 1}])
def test_nothing_else_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint holds no"):
        write_state(tmp_path / "state", {"here": value})


class _Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.safetensors"
    for content in (pickle.dumps(_Hostile(marker)), b"", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(NotAState):
            read_state(path)
        with pytest.raises(NotAState):
            check_state(path)
    torch.save({"module": _Hostile(marker)}, path)
    for read in READERS:
        with pytest.raises(NotAState):
            read(path)
    assert not marker.exists()


@pytest.fixture
def usual_recursion() -> Iterator[None]:
    """As deep as Python goes by itself: torch's compiler lets it go deeper, for good."""
    found = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(found)


@pytest.mark.parametrize(
    "header",
    [
        '{"dict": [["a"]]}',
        '{"dict": [[[], 1]]}',
        '{"call": "os.mkdir"}',
        '{"tensor": "b"}',
        "[" * 10**5,
        "[" * 900 + "]" * 900,
        '{"tuple": 3}',
        "",
        "{",
    ],
)
def test_another_header_is_refused(tmp_path: Path, usual_recursion: None, header: str) -> None:
    path = tmp_path / "state"
    head = json.dumps({"__metadata__": {"fastkd": header}}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    for read in READERS:
        with pytest.raises(NotAState):
            read(path)
