"""MTEB's tasks at the boundary to its package: what it asks of an encoder, and what it is given.

The package itself is an extra that these tests do without; its documented calls are stood in for.
"""

from __future__ import annotations

import importlib.machinery
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models
from tiny_exports import save_sentences
from tiny_models import WIDTH
from tiny_runs import make_recipe

import fastkd

QUERIES = ["w7 w9 w20", "w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23 w24 w25 w26"]
DOCUMENTS = [["w30 w31", "w9 w7 w20"], ["w40"]]


class Task:
    """As mteb's: metadata, data that is loaded, a model that is scored."""

    def __init__(self, modality: str = "text") -> None:
        dataset = {"path": "mteb/some", "revision": "0123"}
        self.metadata = types.SimpleNamespace(modalities=[modality], dataset=dataset)
        self.loaded = False

    def load_data(self) -> None:
        self.loaded = True


class Offline(Task):
    def load_data(self) -> None:
        raise ConnectionError("no route to\nthe hub")


def retrieved(model: Any, task: Task, **settings: Any) -> Any:
    """The mean cosine of queries and documents, by the calls that mteb makes."""
    assert task.loaded
    assert settings == {
        **{"cache": None, "co2_tracker": False, "show_progress_bar": False},
        "encode_kwargs": {"batch_size": 2, "show_progress_bar": False},
    }
    where = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    query, document = (types.SimpleNamespace(value=kind) for kind in ("query", "document"))
    given = settings["encode_kwargs"]
    queries = model.encode([{"text": QUERIES}], prompt_type=query, **where, **given)
    batches = [{"text": texts} for texts in DOCUMENTS]
    documents = model.encode(batches, prompt_type=document, **where, **given)
    assert isinstance(queries, np.ndarray) and documents.shape == (3, WIDTH)
    matrix = model.similarity(queries, documents)
    assert torch.allclose(matrix[0, :2], model.similarity_pairwise(queries[[0, 0]], documents[:2]))
    assert model.similarity(queries[0], documents).shape == (1, 3)
    assert model.mteb_model_meta == "nothing known"
    # tasks draw samples
    random.random(), np.random.random(), torch.rand(1)
    score = float(matrix.mean())
    return types.SimpleNamespace(task_results=[types.SimpleNamespace(get_score=lambda: score)])


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Task]:
    """A stand-in for the package, with tasks by name."""
    known = {"Retrieval": Task(), "Pictures": Task("image"), "Offline": Offline()}

    def get_task(name: str) -> Task:
        if name not in known:
            raise KeyError(f"KeyError: '{name}' not found. Did you mean: 'Retrieval'?")
        return known[name]

    package: Any = types.ModuleType("mteb")
    package.__spec__ = importlib.machinery.ModuleSpec("mteb", None, origin="here")
    package.get_task, package.evaluate = get_task, retrieved
    meta = types.SimpleNamespace(create_empty=lambda: "nothing known")
    package.models = types.SimpleNamespace(ModelMeta=meta)
    monkeypatch.setitem(sys.modules, "mteb", package)
    monkeypatch.setitem(sys.modules, "mteb.models", package.models)
    return known


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    chain = models.Pooling(WIDTH, "mean"), models.Normalize()
    return make_recipe(
        tmp_path,
        teacher={"model": str(save_sentences(tmp_path / "made", *chain))},
        losses={"attention": None, "embedding": None, "embedding_output": {}},
        # what an evaluation drew would be missing from its dropout
        student={"layers": 2, "hidden_size": WIDTH, "dropout": 0.1},
        data={"block_size": 12},
        train={"steps": 2, "warmup_steps": 0, "evaluate_every": 1, "micro_batch_size": 2},
    )


def expected(folder: Path) -> float:
    """What the stand-in scores, by the library's own encoding."""
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 12
    queries = model.encode(["w8 " + text for text in QUERIES], normalize_embeddings=True)
    documents = model.encode(
        [text for texts in DOCUMENTS for text in texts], normalize_embeddings=True
    )
    return float((queries @ documents.T).mean())


def test_tasks_are_scored_by_what_students_give_out(
    recipe: Path, tasks: dict[str, Task], tmp_path: Path
) -> None:
    judged = {"mteb": ["Retrieval"], "mteb_prompts": {"query": "w8 "}}
    result = fastkd.distill(recipe, {"evaluate": judged}, quiet=True)
    summary = result.summary
    teacher = expected(tmp_path / "made" / "sentences")
    assert summary["teacher"]["mteb"] == {"Retrieval": pytest.approx(teacher, abs=1e-5)}
    student = expected(result.folder / "student")
    assert summary["after"]["mteb"] == {"Retrieval": pytest.approx(student, abs=1e-5)}
    assert abs(student - teacher) > 1e-4
    assert "<th scope='row'>Retrieval</th>" in (result.folder / "report.html").read_text()
    # a run that is not judged draws the same dropout
    plain = fastkd.distill(recipe, {"run.output": tmp_path / "plain"}, quiet=True)
    assert plain.losses_after == summary["after"]["losses"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Retrieve", "evaluate.mteb: 'Retrieve' not found. Did you mean: 'Retrieval'"),
        ("Pictures", "evaluate.mteb: task Pictures reads image, expected text alone"),
        ("Offline", r"the data of task Offline can't be loaded \(no route to the hub\)"),
    ],
)
def test_tasks_that_can_not_be_had_are_refused(
    name: str, said: str, recipe: Path, tasks: dict[str, Task], tmp_path: Path
) -> None:
    with pytest.raises(fastkd.UserError, match=said):
        fastkd.distill(recipe, {"evaluate": {"mteb": [name]}}, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.extras.is_installed", lambda package: package != "mteb")
    with pytest.raises(fastkd.UserError, match=r"evaluate.mteb needs mteb; pip install 'fastkd\["):
        fastkd.distill(recipe, {"evaluate": {"mteb": ["Retrieval"]}}, quiet=True)
