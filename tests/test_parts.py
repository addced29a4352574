"""What a recipe says of its models reaches the functions that load them, which take no section."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_runs import make_recipe
from tiny_training import save_classifier, save_encoder, write_recipe, write_task
from transformers import PreTrainedModel

from fastkd.data.batching import plan_batches
from fastkd.distributed import Ranks
from fastkd.models import load_student
from fastkd.recipe import load_any_recipe
from fastkd.training.gather import gather
from fastkd.training.parts import Parts
from fastkd.training.run_folder import RunFolder
from fastkd.types import ModelSource


def gathered(recipe: Path, *overrides: str, made: Path | None = None) -> Parts:
    read, ranks = load_any_recipe(recipe, overrides), Ranks(0, 1, torch.device("cpu"))
    run = None if made is None else RunFolder(str(made))
    return gather(read, plan_batches(read, 1), ranks, progress=False, made=run)


def attention_of(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation).removeprefix("fastkd-")


def test_of_a_distillation(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    parts = gathered(recipe, "teacher.dtype=bfloat16", "teacher.attention=eager")
    teacher, student = parts.teacher_model, parts.module.student
    assert teacher is not None
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert (attention_of(teacher), attention_of(student)) == ("eager", "sdpa")
    assert parts.source == ModelSource(str(tmp_path / "teacher"))


def test_of_a_student_that_a_run_made(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier")
    save_classifier(tmp_path / "made" / "student", num_hidden_layers=2)
    save_file({}, tmp_path / "made" / "projections.safetensors")
    recipe = write_recipe(tmp_path, "student", losses={"labels": {}})
    student = gathered(
        recipe,
        "student.head=sequence_classification",
        "student.attention=eager",
        made=tmp_path / "made",
    ).module.student
    assert type(student).__name__ == "BertForSequenceClassification"
    assert attention_of(student) == "eager"
    assert attention_of(load_student(tmp_path / "made" / "student")) == "sdpa"


def test_of_a_model_that_is_tuned(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_encoder(tmp_path / "encoder")
    recipe = write_recipe(tmp_path, "tuned", model={"name": str(tmp_path / "encoder")})
    parts = gathered(
        recipe,
        "model.dropout=0.25",
        "model.attention=eager",
        "model.gradient_checkpointing=true",
        "model.revision=main",
    )
    model = parts.module.student
    assert model.config.hidden_dropout_prob == 0.25 and attention_of(model) == "eager"
    assert model.is_gradient_checkpointing
    # handed on with its own rates
    assert parts.handed_on["hidden_dropout_prob"] == 0.1
    assert parts.source == ModelSource(str(tmp_path / "encoder"), "main")
    plain = gathered(recipe).module.student
    assert plain.config.hidden_dropout_prob == 0.1 and attention_of(plain) == "sdpa"
    assert not plain.is_gradient_checkpointing


def test_of_a_model_that_a_run_tuned(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "made" / "student")
    other = {"name": "some/name", "revision": "main", "sha256": "a" * 64}
    parts = gathered(write_recipe(tmp_path, "tuned", model=other), made=tmp_path / "made")
    assert parts.source == ModelSource(str(tmp_path / "made" / "student"))
    assert not parts.initialisation.new_head
