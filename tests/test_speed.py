"""Latency and throughput of a run's models: what is timed, how often, and what is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from fastkd.distributed import Ranks
from fastkd.training import speed
from fastkd.training.teacher import NoTeacher
from fastkd.types import LENGTHS, STARTS

RANKS = Ranks(0, 1, torch.device("cpu"))
PADDED = {
    "input_ids": torch.tensor([[1, 2, 0, 0], [3, 4, 5, 0]]),
    "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]),
    "labels": torch.tensor([0, 1]),
}
PACKED = {
    "input_ids": torch.tensor([[1, 2, 3, 4, 5]]),
    "token_type_ids": torch.tensor([[0, 0, 0, 1, 1]]),
    "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    STARTS: torch.tensor([0, 2, 5], dtype=torch.int32),
    LENGTHS: torch.tensor([2, 3]),
}
ALONE = {
    "input_ids": [[3, 4, 5]],
    "token_type_ids": [[0, 1, 1]],
    "position_ids": [[0, 1, 2]],
    STARTS: [0, 3],
    LENGTHS: [3],
}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (PADDED, {"input_ids": [[3, 4, 5]], "attention_mask": [[1, 1, 1]]}),
        (PACKED, ALONE),
        ({"input_ids": torch.tensor([[1, 2], [3, 4]])}, {"input_ids": [[1, 2]]}),
    ],
    ids=["padded", "packed", "blocks"],
)
def test_the_longest_sequence_stands_alone(inputs: Any, expected: dict[str, Any]) -> None:
    found = speed.longest_sequence(inputs)
    assert {name: tensor.tolist() for name, tensor in found.items()} == expected
    batch = speed.repeated(found, 3)
    size = len(expected["input_ids"][0])
    if LENGTHS not in inputs:
        assert batch["input_ids"].shape == (3, size)
        return
    # a packed row stays one, as its models may read nothing else
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, 3 * size)
    assert batch[STARTS].tolist() == [0, 3, 6, 9] and batch[LENGTHS].tolist() == [3, 3, 3]


def measured(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    """What is measured of a student whose pass of one sequence takes `clock[0]` seconds and of 32
    `clock[1]`, and the sizes of the passes."""
    passes: list[int] = []
    now = [0.0]

    def run(inputs: dict[str, Tensor]) -> None:
        passes.append(len(inputs["input_ids"]))
        now[0] += clock[passes[-1] > 1]

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    part = SimpleNamespace(inputs=PADDED)
    parts: Any = SimpleNamespace(
        ranks=RANKS,
        plan=SimpleNamespace(micro_batch_size=2),
        datamodule=SimpleNamespace(heldout=lambda size, ranks: iter([part])),
        move=lambda inputs: inputs,
        teacher=NoTeacher(),
        student=run,
        module=SimpleNamespace(student=tiny_model("bert")),
    )
    return speed.measure_speed(parts), passes


def test_each_number_is_of_one_warm_size(monkeypatch: pytest.MonkeyPatch) -> None:
    found, passes = measured([0.01, 0.08], monkeypatch)
    assert passes == [1] * 6 + [32] * 6
    assert found["tokens"] == {"student": 3} and found["threads"] == torch.get_num_threads()
    one, many = (found["batches"][batch]["student"] for batch in ("1", "32"))
    assert one["milliseconds"] == pytest.approx(10)
    assert one["tokens_per_second"] == pytest.approx(300)
    assert many["milliseconds"] == pytest.approx(80)
    assert many["tokens_per_second"] == pytest.approx(1200)


def test_slow_models_take_few_passes_and_slower_ones_none_of_32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, passes = measured([0.15, 4.0], monkeypatch)
    assert passes == [1] * 4 + [32] * 2
    found, passes = measured([0.2, 6.0], monkeypatch)
    assert passes == [1] * 3 and found["batches"]["32"] == {}


def test_a_batch_that_would_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speed.free_memory(RANKS) > 1 << 20
    config = tiny_model("bert").config
    needed = speed.pass_bytes(config, 32, 3)
    monkeypatch.setattr(speed, "free_memory", lambda ranks: 2 * needed - 1)
    found, _ = measured([0.01, 0.08], monkeypatch)
    assert found["batches"]["32"] == {}
    monkeypatch.setattr(speed, "free_memory", lambda ranks: 2 * needed)
    found, _ = measured([0.01, 0.08], monkeypatch)
    assert found["batches"]["32"]
    eager = tiny_model("bert")
    eager.set_attn_implementation("eager")
    more = 4 * 32 * 3 * 2 * config.num_attention_heads * 3
    assert speed.pass_bytes(eager.config, 32, 3) == needed + more


def test_a_folder_is_as_large_as_what_is_read_of_it(tmp_path: Path) -> None:
    from fastkd.models import model_bytes
    from fastkd.types import ModelSource

    for name, size in {
        **{"config.json": 10, "tokenizer.json": 100, "model.safetensors": 1000},
        **{"pytorch_model.bin": 5000, "README.md": 7},
    }.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert model_bytes(ModelSource(str(tmp_path))) == 1110
    (tmp_path / "model.safetensors").unlink()
    assert model_bytes(ModelSource(str(tmp_path))) == 5110
