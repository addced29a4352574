"""The teacher one micro-batch ahead: the order of what is launched, and what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from device_marks import on_cpu
from tiny_runs import assert_same_run, make_recipe
from torch import Tensor

import fastkd
from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.recipe import load_recipe
from fastkd.training import setup
from fastkd.training.ahead import TeacherAhead, check_overlap
from fastkd.training.chips import CHIPS
from fastkd.training.forecast import forecast, run_dry

GPU = torch.device("cuda", 0)


class Streams:
    """In the place of CUDA's: notes what is asked of which."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.current: Any = Stream(self, "student's")
        self.kept: list[tuple[Tensor, str]] = []

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self._streams, self.name, self._events = streams, name, 0

    def wait_stream(self, other: Any) -> None:
        self._streams.said.append(f"{self.name} waits for all of the {other.name}")

    def record_event(self) -> str:
        self._events += 1
        return f"pass {self._events - 1}"

    def wait_event(self, event: str) -> None:
        self._streams.said.append(f"{self.name} waits for {event}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Stream(found, "teacher's"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: found.current)
    monkeypatch.setattr(torch.cuda, "stream", found.on)

    def record(tensor: Tensor, stream: Stream) -> None:
        found.kept.append((tensor, stream.name))

    monkeypatch.setattr(Tensor, "record_stream", record)
    return found


def test_the_next_pass_is_launched_before_the_states_are_taken(streams: Streams) -> None:
    def teacher(inputs: dict[str, Tensor]) -> Capture:
        number = int(inputs["input_ids"])
        streams.said.append(f"teacher {number} on the {streams.current.name}")
        return Capture(hidden={1: torch.full((1,), number)})

    run: Any = teacher
    batches = [{"input_ids": torch.tensor(number)} for number in range(3)]
    for number, states in enumerate(TeacherAhead(run, GPU)(batches)):
        assert states.hidden[1].item() == number
        streams.said.append(f"student {number} on the {streams.current.name}")
    launch = "teacher's waits for all of the student's"
    assert streams.said == [
        *(launch, "teacher 0 on the teacher's"),
        *(launch, "teacher 1 on the teacher's"),
        *("student's waits for pass 0", "student 0 on the student's"),
        *(launch, "teacher 2 on the teacher's"),
        *("student's waits for pass 1", "student 1 on the student's"),
        *("student's waits for pass 2", "student 2 on the student's"),
    ]
    assert [(int(tensor), name) for tensor, name in streams.kept] == [
        (number, "student's") for number in range(3)
    ]


def test_a_step_of_one_micro_batch_is_taken_in_turn(streams: Streams) -> None:
    run: Any = lambda inputs: Capture(hidden={1: inputs["input_ids"]})  # noqa: E731
    (states,) = TeacherAhead(run, GPU)([{"input_ids": torch.tensor(5)}])
    assert states.hidden[1] == 5 and not list(TeacherAhead(run, GPU)([]))


@on_cpu
def test_a_run_is_the_same(
    tmp_path: Path, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mapping that moves from step to step, and dropout, whose numbers are the student's."""
    monkeypatch.setattr(setup, "check_overlap", lambda *_: None)
    path = make_recipe(
        tmp_path,
        student={"dropout": 0.1},
        losses={"hidden": {"layer_map": {"kind": "random", "redraw": "step"}}},
        train={"steps": 3, "micro_batch_size": 2},
    )
    held = []
    for name, overlap in (("plain", False), ("ahead", True)):
        overrides = {"run.output": tmp_path / name, "teacher.overlap": overlap}
        made = fastkd.distill(path, {**overrides, "train.profile": True}, quiet=True)
        held.append(made.summary["profile"]["memory_bytes"]["captured of the teacher"])
    assert_same_run(tmp_path / "ahead", tmp_path / "plain", losses=0, weights=0)
    assert held[1] == 2 * held[0]
    assert sum("waits for all" in said for said in streams.said) == 3 * 4
    # query and key, hidden states and embeddings that the losses read
    assert len(streams.kept) >= 3 * 4 * 5


@on_cpu
def test_where_no_teacher_runs_ahead(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    with pytest.raises(UserError, match="overlap is on, but this run is on a CPU, which has no"):
        fastkd.distill(path, {"teacher.overlap": True}, quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="but a step is one micro-batch on each rank, and the te"):
        check_overlap(GPU, 1)
    check_overlap(GPU, 2)
    refused = {
        "teacher.cache=exact": "overlap is on, but cache is exact, and a teacher whose states",
        "teacher.placement=shard": "overlap is on, but placement is shard, whose weights are",
        "train.cuda_graph=true": "cuda_graph and teacher.overlap are on, but a graph holds both",
    }
    for override, said in refused.items():
        with pytest.raises(UserError, match=said):
            load_recipe(path, ["teacher.overlap=true", override])


def test_a_forecast_holds_two_micro_batches(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    given = ["train.precision=bf16", "teacher.dtype=bfloat16", "train.micro_batch_size=2"]
    plain, ahead = (load_recipe(path, [*given, f"teacher.overlap={on}"]) for on in (False, True))
    passes = run_dry(plain, 2)
    before, after = (forecast(recipe, passes, CHIPS["h100"], 1) for recipe in (plain, ahead))
    name = "captured of the teacher"
    assert after.parts == {**before.parts, name: 2 * before.parts[name]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_is_the_same(tmp_path: Path) -> None:
    train = {"precision": "fp32", "tf32": False, "micro_batch_size": 2}
    path = make_recipe(tmp_path, teacher={"dtype": "float32"}, train=train)
    for name, overlap in (("plain", False), ("ahead", True)):
        overrides = {"run.output": tmp_path / name, "teacher.overlap": overlap}
        fastkd.distill(path, overrides, quiet=True)
    assert_same_run(tmp_path / "ahead", tmp_path / "plain", losses=1e-4, weights=1e-4)
