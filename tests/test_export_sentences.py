"""A student of a sentence-transformers model is one, with what fits; the rest is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, models
from tiny_exports import exported, made_student, notes_of, save_sentences
from tiny_models import POSITIONS, WIDTH
from tiny_training import save_classifier
from torch import nn

from fastkd.errors import UserError
from fastkd.models import load_teacher
from fastkd.reporting.html import markdown
from fastkd.types import ModelSource

NARROW = {"hidden_size": 16, "intermediate_size": 20}
TEXTS = ["w7 w9 w20", "w11"]


def chain(model: Any) -> list[str]:
    return [type(module).__name__ for module in model]


def notes(teacher: Path, head: Any = "none", **numbers: Any) -> list[str]:
    student, large = made_student(teacher, head, **numbers)
    found = notes_of(student, large.config, ModelSource(str(teacher)), head)
    return [note for note in found if not note.startswith("pooler")]


def edit(path: Path, change: Any) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def old_layout(folder: Path) -> Path:
    """Move the transformer into a folder of its own, as the first releases saved it."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        keep = path.name in ("modules.json", "config_sentence_transformers.json", "README.md")
        if path.is_file() and not keep:
            shutil.move(path, inner / path.name)
    edit(folder / "modules.json", lambda m: [{**m[0], "path": "0_Transformer"}, *m[1:]])
    return folder


@pytest.mark.parametrize("old", [False, True], ids=["", "old layout"])
@pytest.mark.parametrize("numbers", [{}, NARROW], ids=["wide", "narrow"])
def test_pooling_normalisation_and_prompts_are_carried(
    tmp_path: Path, numbers: dict[str, Any], old: bool
) -> None:
    torch.manual_seed(0)
    pooling = models.Pooling(WIDTH, pooling_mode="cls")
    teacher = save_sentences(tmp_path, pooling, models.Dropout(0.1), models.Normalize())
    if old:
        old_layout(teacher)
    assert notes(teacher, **numbers) == []
    folder = exported(tmp_path / "run", teacher, **numbers)
    theirs, own = (SentenceTransformer(str(path), device="cpu") for path in (teacher, folder))
    assert chain(own) == chain(theirs) == ["Transformer", "Pooling", "Dropout", "Normalize"]
    assert own[1].pooling_mode == theirs[1].pooling_mode == "cls"
    width = numbers.get("hidden_size", WIDTH)
    assert own.get_sentence_embedding_dimension() == width
    assert own.prompts == theirs.prompts
    assert own.max_seq_length == theirs.max_seq_length == POSITIONS - 4
    embeddings = own.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    inputs = own.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = (
            own[0]
            .auto_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            .last_hidden_state
        )
    expected = nn.functional.normalize(states[:, 0], dim=1)
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("old", [False, True], ids=["", "old layout"])
def test_weights_are_carried_where_the_width_agrees(tmp_path: Path, old: bool) -> None:
    torch.manual_seed(0)
    dense = models.Dense(WIDTH, 6, activation_function=nn.Identity())
    norm = models.LayerNorm(WIDTH)
    with torch.no_grad():
        norm.norm.weight.normal_()
    pooling = models.Pooling(WIDTH, pooling_mode="cls")
    teacher = save_sentences(tmp_path, pooling, norm, dense, models.Normalize())
    if old:
        old_layout(teacher)
    assert notes(teacher) == []
    own = SentenceTransformer(str(exported(tmp_path / "run", teacher)), device="cpu")
    assert chain(own) == ["Transformer", "Pooling", "LayerNorm", "Dense", "Normalize"]
    assert torch.equal(own[2].norm.weight, norm.norm.weight)
    assert torch.equal(own[3].linear.weight, dense.linear.weight)
    assert torch.equal(own[3].linear.bias, dense.linear.bias)
    assert isinstance(own[3].activation_function, nn.Identity)
    assert own.get_sentence_embedding_dimension() == 6
    embeddings = own.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_weights_of_another_width_are_named_and_the_rest_is_carried(tmp_path: Path) -> None:
    pooling = models.Pooling(WIDTH, pooling_mode="cls")
    teacher = save_sentences(tmp_path, pooling, models.Dense(WIDTH, 6), models.Normalize())
    expected = (
        f"teacher.model {teacher}: of its sentence-transformers modules the student goes without "
        "Dense (its weights are for vectors of 32, the student's have 16)"
    )
    assert notes(teacher, **NARROW) == [expected]
    folder = exported(tmp_path / "run", teacher, **NARROW)
    said = expected.replace(str(teacher), teacher.name)
    assert f"- {said}\n" in (folder / "README.md").read_text()
    own = SentenceTransformer(str(folder), device="cpu")
    assert chain(own) == ["Transformer", "Pooling", "Normalize"]
    assert own[1].pooling_mode == "cls"
    assert own.encode(TEXTS).shape == (2, 16)


@pytest.mark.parametrize("layers", [2, 4])
def test_weights_of_layers_are_carried_where_the_depth_agrees(tmp_path: Path, layers: int) -> None:
    weighted = models.WeightedLayerPooling(WIDTH, num_hidden_layers=4, layer_start=1)
    teacher = save_sentences(tmp_path, weighted, models.Pooling(WIDTH))
    found = notes(teacher, layers=layers)
    kept = ["WeightedLayerPooling"] if layers == 4 else []
    assert bool(found) == (layers == 2)
    if found:
        assert found[0].endswith("(its weights are for 4 layers, the student has 2)")
    own = SentenceTransformer(str(exported(tmp_path / "run", teacher, layers=layers)), device="cpu")
    assert chain(own) == ["Transformer", *kept, "Pooling"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: [*m, {**m[1], "type": "their_code.Own"}], "Own (fastkd doesn't know it)"),
        (lambda m: [*m, {**m[1], "path": "../x"}], "Pooling (its path is '../x')"),
        (lambda m: [*m, {**m[1], "path": "2_Gone"}], "Pooling (its configuration is missing)"),
        (lambda m: [{**m[0], "type": "their_code.Transformer"}, m[1]], "Transformer, Pooling (the"),
        (lambda m: m[1:], "Pooling (the first one is no Transformer)"),
        (lambda m: {"a": 1}, "all (modules.json can't be read"),
        (lambda m: [{"idx": 0}], "all (modules.json can't be read"),
        (lambda m: [], "all (the first one is no Transformer)"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, change: Any, expected: str) -> None:
    teacher = save_sentences(tmp_path, models.Pooling(WIDTH))
    edit(teacher / "modules.json", change)
    (found,) = notes(teacher)
    assert f"the student goes without {expected}" in found
    folder = exported(tmp_path / "run", teacher)
    said = markdown(found.replace(str(teacher), teacher.name))
    assert said in (folder / "README.md").read_text()
    assert not (tmp_path / "x").exists()


def test_a_folder_whose_first_module_is_gone_is_refused(tmp_path: Path) -> None:
    teacher = old_layout(save_sentences(tmp_path, models.Pooling(WIDTH)))
    shutil.rmtree(teacher / "0_Transformer")
    with pytest.raises(UserError, match=rf"^teacher\.model {teacher}: not loadable"):
        load_teacher(ModelSource(str(teacher)))
    (teacher / "modules.json").write_text("[]")
    with pytest.raises(UserError, match=r"modules\.json: not loadable"):
        load_teacher(ModelSource(str(teacher)))


@pytest.fixture
def reranker(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = CrossEncoder(str(save_classifier(tmp_path / "t", num_labels=1)), device="cpu")
    model.save_pretrained(str(tmp_path / "reranker"))
    return tmp_path / "reranker"


def test_a_reranker_stays_one(tmp_path: Path, reranker: Path) -> None:
    head: Any = "sequence_classification"
    assert notes(reranker, head) == []
    folder = exported(tmp_path / "run", reranker, head)
    theirs, own = (CrossEncoder(str(path), device="cpu") for path in (reranker, folder))
    assert type(own.activation_fn) is type(theirs.activation_fn)
    assert own.predict([("w7", "w9"), ("w8", "w10")]).shape == (2,)


def test_a_reranker_without_its_head_is_named(tmp_path: Path, reranker: Path) -> None:
    if not (reranker / "modules.json").exists():
        pytest.skip("this release of sentence-transformers writes no modules for a reranker")
    (found,) = notes(reranker)
    assert "(made for sequence-classification, but student.head is none)" in found
    assert not (exported(tmp_path / "run", reranker) / "modules.json").exists()


def test_an_encoder_that_became_a_classifier_has_no_modules(tmp_path: Path) -> None:
    teacher = save_sentences(tmp_path, models.Pooling(WIDTH))
    tuned = save_classifier(tmp_path / "c", num_labels=2)
    for path in ("config.json", "model.safetensors"):
        shutil.copyfile(tuned / path, teacher / path)
    head: Any = "sequence_classification"
    assert notes(teacher, head) == []
    assert not (exported(tmp_path / "run", teacher, head) / "modules.json").exists()
