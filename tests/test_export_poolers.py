"""`AutoModel` fills nothing of an exported student at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import exported, made_student, notes_of
from tiny_models import NAMES, VOCABULARY, save_teacher, tiny_batch, tiny_model
from tiny_training import save_classifier
from transformers import AlbertConfig, AutoModel, PreTrainedModel

from fastkd.layer_map import make_layer_map
from fastkd.models import build_student, load_student, load_teacher
from fastkd.recipe import Student
from fastkd.training.export.poolers import pooler_note, pooler_to_add
from fastkd.training.export.student import _write_model
from fastkd.types import ModelSource

POOLED = ("bert", "roberta")
NARROW = {"hidden_size": 16, "intermediate_size": 20}
BATCH = tiny_batch()


def read(folder: Path) -> PreTrainedModel:
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("numbers", [{}, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_missing(tmp_path: Path, name: str, numbers: dict[str, Any]) -> None:
    folder = exported(tmp_path / "run", save_teacher(tmp_path / "t", name), **numbers)
    first, second = read(folder), read(folder)
    with torch.no_grad():
        one, other = (model(**BATCH) for model in (first, second))
    assert torch.equal(one.last_hidden_state, other.last_hidden_state)
    if name in POOLED:
        assert torch.equal(one.pooler_output, other.pooler_output)
    assert ("pooler of the student" in (folder / "README.md").read_text()) == (name in POOLED)


@pytest.mark.parametrize("name", POOLED)
def test_the_pooler_of_a_student_as_wide_is_the_teachers(tmp_path: Path, name: str) -> None:
    teacher = save_teacher(tmp_path / "t", name)
    folder = exported(tmp_path / "run", teacher)
    model = read(folder)
    assert torch.equal(model.pooler.dense.weight, tiny_model(name).pooler.dense.weight)
    assert torch.equal(model.pooler.dense.bias, tiny_model(name).pooler.dense.bias)
    assert model.config.fastkd_pooler == "teacher"
    assert "not trained, it is the teacher's, unchanged" in (folder / "README.md").read_text()


@pytest.mark.parametrize("saved", [True, False], ids=["narrow", "teacher has none"])
def test_else_it_passes_the_first_token_on(tmp_path: Path, saved: bool) -> None:
    teacher = save_teacher(tmp_path / "t")
    if not saved:
        path = teacher / "model.safetensors"
        kept = {k: v for k, v in load_file(path).items() if "pooler" not in k}
        save_file(kept, path, metadata={"format": "pt"})
    folder = exported(tmp_path / "run", teacher, **(NARROW if saved else {}))
    model = read(folder)
    with torch.no_grad():
        out = model(**BATCH)
    torch.testing.assert_close(out.pooler_output, out.last_hidden_state[:, 0].tanh())
    assert model.config.fastkd_pooler == "identity"
    assert "it passes the first token's state on" in (folder / "README.md").read_text()


@pytest.mark.parametrize("numbers", [{}, NARROW], ids=["teacher", "identity"])
def test_a_students_folder_has_one_precision(tmp_path: Path, numbers: dict[str, Any]) -> None:
    student, _ = made_student(save_teacher(tmp_path / "t"), **numbers)
    _write_model(student.to(torch.bfloat16), tmp_path / "student")
    found = load_file(tmp_path / "student" / "model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    expected = torch.eye(16) if numbers else tiny_model("bert").pooler.dense.weight
    assert torch.equal(found["pooler.dense.weight"], expected.bfloat16())
    assert json.loads((tmp_path / "student" / "config.json").read_text())["dtype"] == "bfloat16"
    said = "passes the first token's state on" if numbers else "is the teacher's, rounded as the "
    assert said in pooler_note(student)[0]


def test_a_pooler_of_one_layer_alone_is_handed_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    theirs = AutoModel.from_config(config)
    theirs.save_pretrained(tmp_path)
    student = load_teacher(ModelSource(str(tmp_path)))
    origin, weights = pooler_to_add(student)
    assert origin == "teacher"
    assert {k: v.shape for k, v in weights.items()} == {
        "pooler.weight": (32, 32),
        "pooler.bias": (32,),
    }
    assert torch.equal(weights["pooler.weight"], theirs.pooler.weight)


def test_it_is_no_part_of_what_is_trained(tmp_path: Path) -> None:
    student, teacher = made_student(save_teacher(tmp_path / "t"))
    for model in (student, teacher):
        assert not any("pooler" in name for name, _ in model.named_parameters())
        assert not any("pooler" in name for name in model.state_dict())


def test_the_note_is_there_before_the_first_step(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "t")
    student, teacher = made_student(folder)
    source = ModelSource(str(folder))
    expected = "pooler of the student (pooler_output): not trained, it is the teacher's, unchanged"
    assert notes_of(student, teacher.config, source, "none") == [expected]


def test_a_student_with_a_head_keeps_what_it_trained(tmp_path: Path) -> None:
    teacher = save_classifier(tmp_path / "t", num_labels=2)
    folder = exported(tmp_path / "run", teacher, "sequence_classification")
    student, _ = made_student(teacher, "sequence_classification")
    weights = load_file(folder / "model.safetensors")
    expected = student.bert.pooler.dense.weight
    assert torch.equal(weights["bert.pooler.dense.weight"], expected)
    assert "pooler of the student" not in (folder / "README.md").read_text()
    assert "fastkd_pooler" not in (folder / "config.json").read_text()


def test_a_run_with_a_head_takes_its_own_teachers_pooler(tmp_path: Path) -> None:
    general = exported(tmp_path / "run", save_teacher(tmp_path / "t"))
    classifier = save_classifier(tmp_path / "tuned", seed=5, num_labels=2)
    teacher = load_teacher(ModelSource(str(classifier)), head="sequence_classification")
    section = Student(layers=2, head="sequence_classification", init=str(general))
    student, start = build_student(teacher, section, make_layer_map("uniform", 2, 4))
    assert start.copied == start.total
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight)
    assert torch.equal(
        student.bert.embeddings.word_embeddings.weight,
        read(general).embeddings.word_embeddings.weight,
    )
    assert not hasattr(student.config, "fastkd_pooler")


def test_an_exported_student_can_teach_and_is_read_back(tmp_path: Path) -> None:
    first = exported(tmp_path / "run", save_teacher(tmp_path / "t"), layers=3, **NARROW)
    second = exported(tmp_path / "next", first)
    assert torch.equal(read(second).pooler.dense.weight, torch.eye(16))
    with torch.no_grad():
        mine = load_student(first)(**BATCH).last_hidden_state
        assert torch.equal(mine, read(first)(**BATCH).last_hidden_state)
