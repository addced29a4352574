"""Scores beside what one answer to everything is worth, in results, tables and warnings."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from rich.console import Console
from tiny_tasks import encoded

from fastkd.data.tasks import Columns, EncodedExamples, Task
from fastkd.data.tasks.datamodule import ScoreEvaluator
from fastkd.reporting.console import Reporter
from fastkd.reporting.report import print_evaluation, print_summary
from fastkd.reporting.scores import score_parts, score_table

RANKS: Any = SimpleNamespace(sum=lambda tensor: tensor)
TASK = Task(
    name="t", columns=Columns(texts=("a",), label="y"), labels=("no", "yes"), metrics=("f1",)
)


def examples(labels: list[int]) -> EncodedExamples:
    made = encoded([3] * len(labels))
    return EncodedExamples(**{**vars(made), "labels": np.asarray(labels)})


def judged(*predicted: int) -> dict[str, Any]:
    """What an evaluator says of predictions of one set of six examples."""
    sets = {"dev": examples([0, 0, 0, 0, 1, 1])}
    evaluator = ScoreEvaluator(TASK, sets, torch.device("cpu"))
    outputs = torch.nn.functional.one_hot(torch.tensor(predicted), 2).float()
    # in two parts, of which the second has rows that don't count
    evaluator.add(torch.tensor([0, 1, 2, 3]), outputs[:4], None)
    evaluator.add(torch.tensor([4, 5]), torch.cat([outputs[4:], outputs[:2]]), None)
    return evaluator.results(RANKS)


def test_a_score_stands_beside_that_of_one_answer() -> None:
    found = judged(0, 1, 0, 0, 1, 0)
    predicted, right = [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]
    assert found["score"] == pytest.approx(sklearn.metrics.f1_score(right, predicted))
    no, yes = sklearn.metrics.f1_score(right, predicted, average=None)
    assert found["class_f1"]["dev"] == {"no": pytest.approx(no), "yes": pytest.approx(yes)}
    # by F1 the best answer is the rarer class
    best = sklearn.metrics.f1_score(right, [1] * 6)
    assert found["baseline"] == {"score": best, "scores": {"dev": {"f1": best}}}
    assert found["one_class"] == {}
    assert judged(0, 0, 0, 0, 0, 0)["one_class"] == {"dev": "no"}


def test_the_table_has_a_column_for_each_model() -> None:
    before, after = judged(0, 0, 0, 0, 0, 0), judged(0, 1, 0, 0, 1, 0)
    columns, rows = score_table({"teacher": after, "before": before, "after": after})
    assert columns == ("", "one answer", "teacher", "before", "after")
    assert rows == [
        ("score", "0.5000", "0.5000", "0.0000", "0.5000"),
        ("dev, f1", "0.5000", "0.5000", "0.0000", "0.5000"),
        ("dev, F1 of no", "-", "0.7500", "0.8000", "0.7500"),
        ("dev, F1 of yes", "-", "0.5000", "0.0000", "0.5000"),
    ]
    # stages may judge by other things, and text may have a teacher without
    text = {"perplexity": 1234.5, "pairs": {"stsb": 0.75}, "mteb": {"Task": 0.5}}
    columns, rows = score_table({"before": {}, "after": text})
    assert columns == ("", "before", "after")
    assert rows == [
        ("stsb, Spearman", "-", "0.7500"),
        ("Task", "-", "0.5000"),
        ("perplexity", "-", "1,234.50"),
    ]
    assert score_table({"after": {"sentence_cosine": 0.5}})[1] == []


def test_a_model_that_says_one_thing_is_named() -> None:
    same = {"losses": {"labels": 1.0}, "total": 1.0, **judged(1, 1, 1, 1, 1, 1)}
    reporter, written = Reporter(), io.StringIO()
    reporter.console = Console(file=written, width=120)
    print_evaluation(same, reporter)
    summary = {
        **{"before": same, "after": same, "steps": 1, "train_examples": 3, "task_examples": 3},
        **{"parameters": {"student": 1}, "disk_bytes": {"student": 1}, "worse": []},
        **{"peak_memory_of": "process", "peak_memory_bytes": 1, "seconds": 1.0, "world_size": 1},
        "run": "runs/x",
    }
    print_summary(summary, reporter)
    assert "warning: the model predicts yes for all of dev" in written.getvalue()
    assert "warning: the student predicts yes for all of dev" in written.getvalue()


def test_a_line_of_scores_names_sets_where_there_are_several() -> None:
    dev = {"accuracy": 0.5, "f1": 0.25}
    assert score_parts({"score": 0.5, "scores": {"dev": dev}, "pairs": {"sts": 0.75}}) == [
        *("score 0.5000", "accuracy 0.5000", "f1 0.2500", "sts 0.7500")
    ]
    assert score_parts({"scores": {"dev": dev, "test": {"f1": 0.125}}}) == [
        *("dev accuracy 0.5000", "dev f1 0.2500", "test f1 0.1250")
    ]
