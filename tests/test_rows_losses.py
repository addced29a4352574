"""Losses of pairs and groups in whole runs: the same however a step is cut; what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_rows import row_recipe
from tiny_runs import assert_same_run, keys, run_variants
from tiny_training import save_classifier, summary_of
from transformers import AutoModelForSequenceClassification

from fastkd.errors import UserError
from fastkd.recipe import load_recipe

SAVED = {
    "modules.json": [
        {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentence_transformers.base.modules.transformer.Transformer",
        }
    ],
    "sentence_bert_config.json": {"transformer_task": "sequence-classification"},
}
CUT = {"train.micro_batch_size": 2}
# a softmax does not see key biases: Adam would make noise of their gradient
ATTENTION: dict[str, Any] = {"attention": {}}
EMBEDDINGS: dict[str, Any] = {
    **ATTENTION,
    "embedding_output": {},
    "similarity": {"kind": "kl", "dimensions": [8, 16]},
    "pairs": {"loss": "similarity", "between": "query_document"},
    "contrastive": {"symmetric": True},
    "taught": {"loss": "contrastive", "distilled": True},
    "score": {"kind": "margin_mse"},
    "listed": {"loss": "score", "kind": "listwise_kl", "target": "file", "scale": 20},
}
SCORES: dict[str, Any] = {
    **ATTENTION,
    "score": {},
    "margins": {"loss": "score", "kind": "margin_mse"},
    "listed": {"loss": "score", "kind": "listwise_kl", "target": "file", "temperature": 2},
}
RERANKER = {"student.head": "sequence_classification", "losses": SCORES}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs on whole steps, and on steps that are cut."""
    folder = tmp_path_factory.mktemp("rows")
    data = {"columns": ["query", "passages"], "candidates": 2, "scores": "scores"}
    recipe = row_recipe(folder, losses=EMBEDDINGS, data=data, train={"steps": 4})
    names = {0: "irrelevant"}
    save_classifier(folder / "reranker", num_labels=1, id2label=names)
    # as a CrossEncoder leaves it: no Pooling stands behind the transformer
    for name, content in SAVED.items():
        (folder / "reranker" / name).write_text(json.dumps(content))
    given = {**RERANKER, "teacher.model": str(folder / "reranker")}

    def run(name: str, **values: Any) -> list[str]:
        return keys({"run.output": str(folder / name), **values})

    cut = [run("micro", **CUT), run("tokens", **{"data.batch_tokens": 100})]
    cut.append(run("micro-reranker", **given, **CUT))
    run_variants(recipe, [run("whole"), run("whole-reranker", **given), *cut])
    run_variants(recipe, [run("ranks", **CUT), run("ranks-reranker", **given, **CUT)], ranks=2)
    return folder


@pytest.mark.parametrize("name", ["micro", "tokens", "ranks", "micro-reranker", "ranks-reranker"])
def test_a_run_is_the_same_however_its_steps_are_cut(name: str, runs: Path) -> None:
    whole = "whole-reranker" if "reranker" in name else "whole"
    assert_same_run(runs / name, runs / whole, losses=2e-4, weights=5e-5)


def test_a_reranker_needs_no_task_and_keeps_its_label(runs: Path) -> None:
    summary = summary_of(runs / "whole-reranker")
    assert set(SCORES) - {"attention"} < set(summary["after"]["losses"])
    assert summary["after"]["losses"]["score"] < summary["before"]["losses"]["score"]
    student = AutoModelForSequenceClassification.from_pretrained(runs / "whole-reranker/student")
    assert student.config.id2label == {0: "irrelevant"} and student.config.num_labels == 1


BLOCKS = {"data.documents": "line", "data.columns": None}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "blocks": (
        {"losses": {"contrastive": {}}, **BLOCKS},
        r"losses\.contrastive is on, which compares queries with documents, but a row of .* one t",
    ),
    "one text": (
        {"losses": {"similarity": {"between": "query_document"}}, "data.columns": "query"},
        r"losses\.similarity\.between is query_document, which compares queries with documents",
    ),
    "paired": (
        {"losses": {"contrastive": {}}, "student.head": "sequence_classification"},
        r"contrastive is on, .* but student\.head is sequence_classification, which reads both",
    ),
    "no candidates": (
        {"losses": {"score": {}}, "data.columns": "query"},
        r"losses\.score compares the candidates of a row, but a row of the data is one text; ",
    ),
    "one candidate": (
        {"losses": {"score": {"kind": "margin_mse"}}, "data.columns": ["query", "positive"]},
        r"losses\.score\.kind is margin_mse, .* a row has one; name several in data\.columns",
    ),
    "no scores": (
        {"losses": {"score": {"target": "file"}}},
        r"losses\.score\.target is file, but data\.scores names no column; ",
    ),
    "of embeddings": (
        {"losses": {"score": {"scale": 2}}, "student.head": "sequence_classification"},
        r"losses\.score\.scale is of embeddings, but student\.head is sequence_classification",
    ),
    "temperature": (
        {"losses": {"score": {"temperature": 2}}},
        r"losses\.score: temperature is read by listwise_kl only, but kind is mse; leave it out",
    ),
    "prefixes of dot products": (
        {"losses": {"score": {"similarity": "dot", "dimensions": [8]}}},
        r"losses\.score: similarity is dot, but dimensions names prefixes, which are scaled to",
    ),
    "temperature of mse": (
        {"losses": {"similarity": {"temperature": 2}}},
        r"losses\.similarity: temperature is read by kl only, but kind is mse; leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_without_what_a_loss_compares_are_refused(case: str, tmp_path: Path) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as refused:
        load_recipe(row_recipe(tmp_path, losses={"hidden": {}}), keys(changes))
    assert "\n" not in str(refused.value)
