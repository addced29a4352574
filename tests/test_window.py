"""What a line of metrics says of the steps since the last one, worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastkd.training import window
from fastkd.training.window import Window


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Window]:
    """A window of a run of one loss, and of batches of 8 examples of 16 tokens; 10 s go by."""
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(window.time, "perf_counter", lambda: next(clock))
    rates = iter([[0.1], [0.2], [0.3]])
    engine = SimpleNamespace(
        skipped_steps=0, get_lr=lambda: next(rates), get_global_grad_norm=lambda: 5.0
    )
    run: Any = SimpleNamespace(
        engine=engine,
        objective=SimpleNamespace(labels=("a",)),
        ranks=SimpleNamespace(device=torch.device("cpu"), sum=lambda values: values),
        profile=SimpleNamespace(collect=lambda: None),
        datamodule=SimpleNamespace(counted=("tokens", 16)),
        recipe=SimpleNamespace(train=SimpleNamespace(batch_size=8)),
    )
    batches: Any = SimpleNamespace(state_dict=dict)
    yield Window(run, batches, 0)


def test_a_line_is_of_the_means_of_its_steps(made: Window) -> None:
    made.add(torch.tensor([[1.0], [2.0]]))
    made.add(torch.tensor([[3.0], [4.0]]))
    # an evaluation
    made.exclude(6.0)
    record, stops = made.close(stop=False)
    assert record == {
        "loss": 3.0,
        "losses": {"a": 2.0},
        "weighted": {"a": 3.0},
        # of the last step
        "learning_rate": 0.2,
        "gradient_norm": 5.0,
        # in the four seconds that are left
        "tokens_per_second": 2 * 8 * 16 / 4,
    }
    assert not stops
    assert made.start == made.step == 2 and not made.sum.any(), "the next line begins anew"
