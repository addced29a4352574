"""A student has the numbers of its teacher's folder, whatever precision the teacher runs in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_teacher
from tiny_runs import make_recipe
from tiny_training import save_classifier, write_recipe, write_task
from transformers import AutoModel, PreTrainedModel

from fastkd.distributed import Ranks, start_ranks, stop_ranks
from fastkd.models import load_teacher, set_aside_pooler
from fastkd.recipe import load_recipe
from fastkd.training import unrounded
from fastkd.training.chips import CHIPS
from fastkd.training.forecast import forecast, run_dry
from fastkd.training.setup import Run, set_up

TABLE = "embeddings.word_embeddings.weight"
SIZES = ("layers", "hidden_size", "intermediate_size")
HALF = ("bfloat16", "float16")


@pytest.fixture
def ranks() -> Any:
    yield start_ranks()
    stop_ranks()


def opened(path: Path, ranks: Ranks, dtype: str, precision: str = "fp32") -> Run:
    given = [f"teacher.dtype={dtype}", f"train.precision={precision}"]
    return set_up(load_recipe(path, given), ranks, progress=False)


def numbers(student: PreTrainedModel) -> dict[str, torch.Tensor]:
    pooler = set_aside_pooler(student)
    found = dict(student.named_parameters())
    return found if pooler is None else {**found, **pooler.weights}


@pytest.mark.parametrize("dtype", HALF)
def test_nothing_of_a_student_is_rounded(tmp_path: Path, ranks: Ranks, dtype: str) -> None:
    path = make_recipe(tmp_path, student={"hidden_size": 32, "freeze_word_embeddings": True})
    rounded, plain = (opened(path, ranks, given) for given in (dtype, "float32"))
    stored = load_file(tmp_path / "teacher" / "model.safetensors")
    kept, expected = (numbers(run.module.student) for run in (rounded, plain))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert torch.equal(kept[TABLE], stored[TABLE])
    assert torch.equal(kept["dense.weight"], stored["pooler.dense.weight"])
    # and the teacher is as it was asked for
    table = rounded.teacher_model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert torch.equal(table, stored[TABLE].to(getattr(torch, dtype)))


def test_channels_that_are_chosen_are_not_rounded(tmp_path: Path, ranks: Ranks) -> None:
    section = {"init": "importance", "heads": 3}
    path = make_recipe(tmp_path, student=section, losses={"attention": None})
    run = opened(path, ranks, "bfloat16")
    columns = load_file(tmp_path / "teacher" / "model.safetensors")[TABLE].T
    kept = run.module.student.get_input_embeddings().weight.detach().T
    assert kept.shape[0] == 24 and len(columns) == 32
    assert all(any(torch.equal(one, column) for column in columns) for one in kept)


def test_a_head_that_is_copied_is_not_rounded(tmp_path: Path, ranks: Ranks) -> None:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier")
    run = opened(write_recipe(tmp_path, "run"), ranks, "bfloat16")
    stored = load_file(tmp_path / "classifier" / "model.safetensors")
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(run.module.student.get_parameter(name), stored[name])
    assert run.module.student.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize(
    ("stored", "dtype", "precision", "times"),
    [
        ("float32", "bfloat16", "fp32", 1),
        ("float32", "bfloat16", "bf16", 0),
        ("float32", "float16", "bf16", 1),
        ("bfloat16", "bfloat16", "fp32", 0),
        ("bfloat16", "float16", "fp32", 1),
        ("float32", "float32", "fp32", 0),
    ],
)
def test_a_folder_is_read_again_where_its_teacher_is_rounded(
    tmp_path: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    dtype: str,
    precision: str,
    times: int,
) -> None:
    path = make_recipe(tmp_path)
    folder = tmp_path / "teacher"
    AutoModel.from_pretrained(folder, dtype=getattr(torch, stored)).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == stored
    reads: list[object] = []

    def counted(*given: Any, **named: Any) -> PreTrainedModel:
        reads.append(given)
        return load_teacher(*given, **named)

    monkeypatch.setattr(unrounded, "load_teacher", counted)
    run = opened(path, ranks, dtype, precision)
    assert len(reads) == times
    passes = run_dry(run.recipe, 4)  # type: ignore[arg-type]
    found = forecast(run.recipe, passes, CHIPS["h100"], 1)  # type: ignore[arg-type]
    each = {"float32": 4}.get(dtype, 2) + 4 * times
    assert found.loading == each * passes.teacher_numbers


def test_another_model_to_start_from_needs_no_second_reading(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = save_teacher(tmp_path / "small", seed=3)
    path = make_recipe(tmp_path, student=dict.fromkeys(SIZES) | {"init": str(start)})
    monkeypatch.setattr(unrounded, "load_teacher", None)
    run = opened(path, ranks, "bfloat16")
    stored = load_file(start / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(run.module.student.get_input_embeddings().weight, stored)
