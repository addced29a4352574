"""Recorded steps: what is copied, kept and refreshed around a graph; on a GPU, the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_marks import on_cpu
from tiny_models import tiny_batch, tiny_model
from tiny_runs import assert_same_run, make_recipe
from torch import Tensor

import fastkd
from fastkd.errors import UserError
from fastkd.layer_map import Progress
from fastkd.layer_map.random_map import RandomMap
from fastkd.training import graphs, setup
from fastkd.training.graphs import GraphedStep, check_graphs

GPU = torch.device("cuda", 0)
LOSSES = {
    "attention": {"schedule": {"first": 1.0, "last": 0.0}},
    "hidden": {"weight": 2},
    "embedding": {},
}
BATCHES = [tiny_batch(lengths) for lengths in ((8, 5), (12, 7, 3), (6, 8), (8, 5))]


class Stub:
    """In the place of a graph: a function that is run once as a warm-up, and again as a replay."""

    def __init__(self) -> None:
        self.records = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        self.records += 1
        made = function().clone()
        return lambda: made.copy_(function()), made


class Pair:
    """A distiller whose step is one micro-batch, as a run's is."""

    def __init__(self, device: str = "cpu", dropout: float = 0.0, **losses: Any) -> None:
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        student = tiny_model("bert", 1, num_hidden_layers=2, hidden_size=24, **rates).train()
        teacher = tiny_model("bert", num_hidden_layers=3).requires_grad_(False)
        models = student.to(device), teacher.to(device)
        self.distiller = fastkd.Distiller(*models, {**LOSSES, **losses})
        self.distiller.__enter__()
        self.objective = self.distiller.objective

    def step(self, inputs: Any, scale: Tensor) -> Tensor:
        states = self.distiller._runs[-1](inputs)
        total, parts = self.distiller._pair[0](inputs, states, scale)
        total.backward()
        return parts

    def shares(self, inputs: Any) -> Tensor:
        return self.objective.divisors(inputs).clamp(min=1).reciprocal().float()

    def gradients(self) -> list[Tensor | None]:
        return [p.grad for p in self.distiller.parameters()]


def graphed(pair: Pair, record: Any = None) -> GraphedStep:
    for parameter in pair.distiller.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return GraphedStep(pair.step, pair.objective, pair.distiller.parameters(), record)


def compare(plain: Pair, other: Pair, run: GraphedStep, device: str = "cpu") -> None:
    """Steps of two micro-batches each, of two shapes, while a weight moves and others look on."""
    before = other.gradients()
    for step in range(4):
        for pair in (plain, other):
            pair.distiller.at(step, 4)
            pair.distiller.zero_grad(set_to_none=False)
        for number in (step, step - 1):
            batch = {name: tensor.to(device) for name, tensor in BATCHES[number].items()}
            expected = plain.step(batch, plain.shares(batch))
            torch.testing.assert_close(run(batch, other.shares(batch)), expected)
        pairs = zip(other.gradients(), plain.gradients(), strict=True)
        for found, wanted in pairs:
            # a weight that no loss reads has none where nothing is recorded
            torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted)
        # an evaluation has weights of its own
        other.objective.eval()
        other.objective.at(Progress())
        with torch.no_grad():
            other.distiller(batch)
        other.objective.train()
    assert all(a is b for a, b in zip(other.gradients(), before, strict=True))


def test_a_recorded_step_is_the_plain_one() -> None:
    plain, other, stub = Pair(), Pair(), Stub()
    run = graphed(other, stub)
    compare(plain, other, run)
    assert stub.records == 2


def test_shapes_beyond_the_bound_run_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_SHAPES", 1)
    plain, other, stub = Pair(), Pair(), Stub()
    compare(plain, other, graphed(other, stub))
    assert stub.records == 1


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (
            {"hidden": {"layer_map": {"kind": "random", "redraw": "step"}}},
            "but layer_map random draws other layers over the run, which",
        ),
        (
            {"attention": {"kind": "kl", "temperature_schedule": {"first": 1.0, "last": 0.5}}},
            r"but losses.attention.temperature_schedule is a number of Python, which",
        ),
    ],
)
def test_what_python_changes_is_refused(losses: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=f"^train.cuda_graph is on, {expected}"):
        graphed(Pair(**losses), Stub())


def test_where_nothing_can_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="but this run is on a CPU; take a GPU, or leave cuda"):
        fastkd.distill(make_recipe(tmp_path), {"train.cuda_graph": True}, quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="but this run stands in DeepSpeed's engine, which works"):
        check_graphs(GPU, by_deepspeed=True, recomputes=False)
    with pytest.raises(UserError, match=r"gradient_checkpointing are on, .*; add train.compile"):
        check_graphs(GPU, by_deepspeed=False, recomputes=True)
    check_graphs(GPU, by_deepspeed=False, recomputes=False)


def test_a_map_that_moves_unannounced_gets_a_graph_for_each_draw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RandomMap, "moves", False)
    drawn = {"hidden": {"layer_map": {"kind": "random", "redraw": "step"}}}
    plain, other, stub = Pair(**drawn), Pair(**drawn), Stub()
    compare(plain, other, graphed(other, stub))
    assert stub.records > 2


@on_cpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_recorded_steps(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything of a graph but the graph."""
    monkeypatch.setattr(graphs, "Recorder", lambda _device: Stub())
    monkeypatch.setattr(setup, "check_graphs", lambda *_arguments, **_keywords: None)
    train = {"steps": 3, "micro_batch_size": 4, "precision": precision}
    recipe = make_recipe(tmp_path, train=train, losses={"balance": "ratio"})
    for name, recorded in (("plain", False), ("graph", True)):
        overrides = {"run.output": tmp_path / name, "train.cuda_graph": recorded}
        fastkd.distill(recipe, overrides, quiet=True)
    assert_same_run(tmp_path / "graph", tmp_path / "plain", losses=1e-6, weights=1e-7)


@pytest.fixture
def broken_recording(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA without a GPU, whose graphs say at their end that they are broken, and stop there; the
    streams that are set."""
    chosen: list[str] = []

    @contextmanager
    def graph(*_given: Any, **_options: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    anything: Any = lambda *_given: nullcontext()  # noqa: E731
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, anything)
    monkeypatch.setattr(torch.random, "fork_rng", anything)
    stream = SimpleNamespace(wait_stream=lambda _other: None, name="before")
    monkeypatch.setattr(torch.cuda, "Stream", lambda **_priority: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda one: chosen.append(one.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return chosen


@pytest.mark.parametrize(
    ("reason", "raised", "said"),
    [
        (
            RuntimeError("it waits"),
            UserError,
            r"can't be recorded \(RuntimeError: it waits\); leave cuda_graph out, in a new process",
        ),
        (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "no room"),
        (None, UserError, r"\(RuntimeError: operation failed due to a previous error"),
    ],
)
def test_what_broke_a_recording_is_said(
    reason: Exception | None, raised: type[Exception], said: str, broken_recording: list[str]
) -> None:
    calls = iter([None] * graphs._WARM_UP + [reason])

    def function() -> Tensor:
        if (error := next(calls)) is not None:
            raise error
        return torch.zeros(1)

    with pytest.raises(raised, match=said):
        graphs.Recorder(GPU)(function)
    # the one of the recording would stay
    assert broken_recording == ["before"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_the_step() -> None:
    plain, other = Pair("cuda"), Pair("cuda")
    compare(plain, other, graphed(other), "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_is_drawn_anew_at_every_replay() -> None:
    pair = Pair("cuda", dropout=0.5)
    run, state = graphed(pair), torch.cuda.get_rng_state()
    batch = {name: tensor.cuda() for name, tensor in BATCHES[0].items()}
    first, second = (run(batch, pair.shares(batch)).clone() for _ in range(2))
    assert not torch.allclose(first, second)
    # what was drawn while it was recorded is not missing afterwards
    torch.cuda.set_rng_state(state)
    torch.testing.assert_close(run(batch, pair.shares(batch)), first)
