"""`fastkd export --onnx`: the graph computes what the student does, or nothing is kept."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer, SparseEncoder, models
from tiny_exports import exported, save_sentences
from tiny_models import save_teacher
from tiny_training import fastkd, save_classifier
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastkd.errors import UserError
from fastkd.publishing import onnx_graph
from fastkd.training.run_folder import RunFolder
from fastkd.types import Head

runtime = pytest.importorskip("onnxruntime", reason="the extra of ONNX is not installed")
TEXTS = ["w7 w8 w9", "w10"]


def finished(student: Path, head: Head = "none") -> RunFolder:
    """The folder of a run that has exported a student, as if it were finished."""
    run = RunFolder(student.parent)
    tree = {
        "teacher": {"model": "org/large"},
        "student": {"layers": 1, "head": head},
        "losses": {"hidden": {}},
        "data": {"train": "python-docs"},
        "run": {"output": str(run.path)},
    }
    run.recipe.write_text(yaml.safe_dump(tree))
    run.summary.write_text('{"steps": 1}')
    return run


def computed(graph: Path, texts: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    """What ONNX Runtime makes of texts, from the graph's folder alone."""
    session = runtime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(graph.parent)
    encoded = tokenizer(texts, padding=True, return_tensors="np")
    names = [value.name for value in session.get_outputs()]
    ids = encoded["input_ids"]
    fed = {"attention_mask": encoded["attention_mask"], "token_type_ids": np.zeros_like(ids)}
    fed = {i.name: {"input_ids": ids, **fed}[i.name].astype(np.int64) for i in session.get_inputs()}
    return dict(zip(names, session.run(names, fed), strict=True))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A student of a sentence-transformers model whose vectors go through a Dense."""
    folder = tmp_path_factory.mktemp("onnx")
    teacher = save_sentences(folder, models.Pooling(32), models.Dense(32, 6), models.Normalize())
    return finished(exported(folder / "run", teacher, layers=1))


@pytest.fixture(scope="module")
def graph(sentences: RunFolder) -> onnx_graph.OnnxGraph:
    students = {path.name for path in sentences.student.iterdir()}
    make = onnx_graph._make

    def looked_at(*given: Any) -> Any:
        # what a kill leaves now is no part of the student, and goes when the run is next used
        assert {path.name for path in sentences.student.iterdir()} == students
        return make(*given)

    killed = sentences.path / ".student.1"
    killed.mkdir()
    with pytest.MonkeyPatch.context() as watched:
        watched.setattr(onnx_graph, "_make", looked_at)
        made = onnx_graph.export_onnx(sentences)
    assert not [path.name for path in sentences.path.iterdir() if "student." in path.name]
    return made


def test_vectors_are_those_of_sentence_transformers(
    sentences: RunFolder, graph: onnx_graph.OnnxGraph
) -> None:
    assert graph.path == sentences.student / "onnx" / "model.onnx"
    assert graph.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert graph.outputs == ("last_hidden_state", "sentence_embedding")
    assert graph.difference < 1e-5
    assert {path.name for path in graph.path.parent.iterdir()} >= {"config.json", "tokenizer.json"}
    model = SentenceTransformer(str(sentences.student), device="cpu")
    for texts in (TEXTS, TEXTS[:1], [*TEXTS, "w7 " * 40]):
        expected = model.encode(texts)
        np.testing.assert_allclose(
            computed(graph.path, texts)["sentence_embedding"], expected, atol=1e-5
        )


def test_a_graph_that_computes_something_else_is_not_kept(
    sentences: RunFolder,
    graph: onnx_graph.OnnxGraph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(student: Any, *, f: Path, **_: Any) -> None:
        f.write_bytes(graph.path.read_bytes())
        with torch.no_grad():
            student.model.embeddings.word_embeddings.weight.mul_(1.01)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(UserError, match=r"ONNX Runtime computes another (sentence|last).*kept$"):
        onnx_graph.export_onnx(sentences, tmp_path / "graph")

    def not_a_number(student: Any, *, f: Path, **_: Any) -> None:
        f.write_bytes(graph.path.read_bytes())
        with torch.no_grad():
            student.model.encoder.layer[0].output.LayerNorm.weight.fill_(torch.nan)

    monkeypatch.setattr(torch.onnx, "export", not_a_number)
    with pytest.raises(UserError, match="by inf, expected"):
        onnx_graph.export_onnx(sentences, tmp_path / "graph")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, f, **__: f.write_bytes(b"no graph"))
    with pytest.raises(UserError, match=r"no ONNX graph can be made of BertModel \("):
        onnx_graph.export_onnx(sentences, tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_gives_its_logits_to_the_folder_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_classifier(tmp_path / "t", num_labels=3)
    student = exported(tmp_path / "run", teacher, "sequence_classification", layers=1)
    run = finished(student, "sequence_classification")
    folder = tmp_path / "graph"
    given = ("export", str(run.path), "--onnx", "--output", str(folder))
    assert fastkd(*given, monkeypatch=monkeypatch) == 0
    assert f"{folder / 'model.onnx'}: from input_ids, attention_mask" in capsys.readouterr().out
    assert not (student / "onnx").exists()
    model = AutoModelForSequenceClassification.from_pretrained(student).eval()
    encoded = AutoTokenizer.from_pretrained(student)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**encoded).logits
    np.testing.assert_allclose(
        computed(folder / "model.onnx", TEXTS)["logits"], expected, atol=1e-5
    )
    assert fastkd(*given, monkeypatch=monkeypatch) == 2
    assert f"fastkd: {folder} exists already; remove it" in capsys.readouterr().err


def test_what_has_no_graph_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = exported(tmp_path / "run", save_teacher(tmp_path / "t"))
    run = finished(student, "causal_lm")
    for arguments, expected in (
        (["--onnx"], f"{run.path}: its student generates text (student.head is causal_lm), and "),
        ([], "no format is given; give --onnx, which is the one there is"),
    ):
        assert fastkd("export", str(run.path), *arguments, monkeypatch=monkeypatch) == 2
        assert f"fastkd: {expected}" in capsys.readouterr().err
    finished(student)
    (student / "modules.json").write_text('[{"type": "their_code.Own", "path": ""}]')
    with pytest.raises(UserError, match="fastkd can't use its modules Own"):
        onnx_graph.export_onnx(run)
    run.summary.unlink()
    with pytest.raises(UserError, match="holds no finished run"):
        onnx_graph.export_onnx(run)
    assert not (student / "onnx").exists()


def test_what_the_exporter_prints_of_a_graph_that_it_gives_up_is_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    teacher = save_teacher(tmp_path / "t", "llama", rope_parameters=rope)
    run = finished(exported(tmp_path / "run", teacher, layers=1))
    capfd.readouterr()
    disabled = logging.root.manager.disable
    with pytest.raises(UserError, match=r"no ONNX graph can be made of LlamaModel \(Could not"):
        onnx_graph.export_onnx(run)
    said = "".join(capfd.readouterr())
    assert "torch/fx" not in said and "forward(" not in said and len(said.splitlines()) < 9
    assert logging.root.manager.disable == disabled


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder]:
    """A teacher that makes vectors and has a head of language, and the run of its student."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    teacher = save_sentences(folder, models.Pooling(32), models.Normalize())
    whole = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(teacher))
    whole.save_pretrained(teacher)
    student = exported(folder / "run", teacher, "masked_lm", layers=1)
    return teacher, finished(student, "masked_lm")


@pytest.fixture(scope="module")
def both(encoder: tuple[Path, RunFolder]) -> onnx_graph.OnnxGraph:
    return onnx_graph.export_onnx(encoder[1])


def test_an_encoder_with_its_language_head_gives_both(
    encoder: tuple[Path, RunFolder], both: onnx_graph.OnnxGraph
) -> None:
    assert both.outputs == ("logits", "sentence_embedding") and not both.left_out
    expected = SentenceTransformer(str(encoder[1].student), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(
        computed(both.path, TEXTS)["sentence_embedding"], expected, atol=1e-5
    )


def test_vectors_that_are_not_known_are_left_out_with_a_word(
    encoder: tuple[Path, RunFolder],
    both: onnx_graph.OnnxGraph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is asked of the exporter, whose logits are those of the same student with vectors."""
    plain, asked = tmp_path / "plain", []
    shutil.copytree(encoder[0], plain)
    for path in ("modules.json", "config_sentence_transformers.json"):
        (plain / path).unlink()
    SparseEncoder(str(plain), device="cpu").save_pretrained(str(tmp_path / "sparse"))
    student = exported(tmp_path / "run", tmp_path / "sparse", "masked_lm", layers=1)

    def export(*_: Any, f: Path, output_names: tuple[str, ...], **__: Any) -> None:
        asked.append(output_names)
        f.write_bytes(both.path.read_bytes())

    monkeypatch.setattr(torch.onnx, "export", export)
    graph = onnx_graph.export_onnx(finished(student, "masked_lm"))
    assert graph.outputs == ("logits",) and asked == [graph.outputs]
    assert "; without sentence_embedding: model " in str(graph) and "SpladePooling" in str(graph)
