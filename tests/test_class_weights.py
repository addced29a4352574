"""Weighted classes: a mean over the weights of a whole step, however it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_batch, tiny_config
from tiny_runs import assert_same_run
from tiny_tasks import encoded
from tiny_training import save_classifier, write_recipe
from torch.nn.functional import log_softmax
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import fastkd
from fastkd.capture import Capture
from fastkd.data.tasks import Columns, Task
from fastkd.data.tasks.prepare import _class_weights
from fastkd.losses.counts import DIVISORS, count_divisors
from fastkd.losses.factory import hard_objective
from fastkd.losses.objective import DistilledStudent
from fastkd.types import IGNORE_INDEX, LABEL_WEIGHTS

CLASSES = np.array([1.0, 4.0, 2.5])


def classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config("bert", num_labels=3, hidden_dropout_prob=0.0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.double().eval()


def weighed_batch(labels: list[int]) -> dict[str, torch.Tensor]:
    """Examples with labels and their weights."""
    batch = tiny_batch([3 + number % 9 for number in range(len(labels))])
    weights = torch.from_numpy(CLASSES[np.maximum(labels, 0)])
    return {**batch, "labels": torch.tensor(labels), LABEL_WEIGHTS: weights}


@pytest.mark.parametrize("cuts", [(10,), (3, 3, 4), (1, 8, 1)])
def test_cutting_a_step_changes_no_weighted_mean(cuts: tuple[int, ...]) -> None:
    labels = [0, 0, 1, 0, 2, IGNORE_INDEX, 1, 0, 0, 2]
    inputs, model = weighed_batch(labels), classifier()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    weights = [CLASSES[label] if label >= 0 else 0.0 for label in labels]
    losses = [
        -weight * log_softmax(row, -1)[max(label, 0)]
        for row, label, weight in zip(logits, labels, weights, strict=True)
    ]
    expected = torch.stack(losses).sum() / sum(weights)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    objective, _ = hard_objective(model, "sequence_classification", 1)
    student = DistilledStudent(model, objective)
    parts = [dict(zip(inputs, part, strict=True)) for part in _split(inputs, cuts)]
    counts = [objective.divisors(part) for part in parts]
    assert torch.stack(counts).sum(dim=0)[DIVISORS.index("labels")] == sum(weights)
    whole, total = torch.stack(counts).sum(dim=0), 0.0
    for part, count in zip(parts, counts, strict=True):
        loss, _ = student(part, Capture(), count / whole)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-9, atol=1e-14), name


def _split(inputs: dict[str, torch.Tensor], cuts: tuple[int, ...]) -> list[tuple[Any, ...]]:
    return list(zip(*(tensor.split(cuts) for tensor in inputs.values()), strict=True))


def test_labels_without_weights_count_alike() -> None:
    inputs = weighed_batch([0, 1, IGNORE_INDEX])
    del inputs[LABEL_WEIGHTS]
    counts = count_divisors(inputs, False, "valid", inputs["labels"])
    assert counts[DIVISORS.index("labels")] == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier and a task with three examples of one class to one of the other."""
    folder = tmp_path_factory.mktemp("weights")
    save_classifier(folder / "classifier")
    (folder / "task").mkdir()
    for split, count in (("train", 32), ("dev", 12)):
        rows = [
            f"{'w5 ' * (2 + n % 7)}w{20 + n}\t{'no' if n % 4 == 0 else 'yes'}" for n in range(count)
        ]
        (folder / "task" / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return folder


def test_a_run_is_the_same_however_its_steps_are_cut(folder: Path) -> None:
    # dropout would draw other numbers
    still = {"name": str(folder / "classifier"), "dropout": 0.0}
    tree = {"model": still, "task": {"class_weights": "balanced"}}
    train = {"steps": 3, "learning_rate": 1e-3}
    runs = []
    for size in (8, 3):
        path = write_recipe(folder, f"tuned{size}", **tree, train={**train, "batch_size": 24})
        runs.append(fastkd.finetune(path, {"train.micro_batch_size": size}, quiet=True))
    assert_same_run(runs[0].folder, runs[1].folder, losses=1e-5, weights=1e-3)

    # the held-out loss is weighted too: one of the rarer class counts three times
    model, tokenizer = runs[0].student, runs[0].tokenizer
    rows = (folder / "task" / "dev.tsv").read_text().splitlines()[1:]
    total = weights = 0.0
    for row in rows:
        text, label = row.split("\t")
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0].double()
        weight = 3.0 if label == "no" else 1.0
        total -= weight * log_softmax(logits, -1)[int(label == "yes")].item()
        weights += weight
    assert runs[0].losses_after["labels"] == pytest.approx(total / weights, rel=1e-5)
    unweighted = fastkd.evaluate(runs[0], {"task.class_weights": None}, quiet=True)
    assert unweighted.losses["labels"] != pytest.approx(total / weights, rel=1e-3)


LABELS = {"losses": {"labels": {}, "logits": {}}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"task": {"class_weights": [1.0]}, **LABELS},
            "has 1 weights, expected 2, one for each of",
        ),
        (
            {"task": {"class_weights": [1, 0]}, **LABELS},
            r"class_weights: expected balanced, or.*given \[1, 0\]",
        ),
        (
            {"task": {"class_weights": "even"}, **LABELS},
            "class_weights: expected balanced, or",
        ),
        (
            {"task": {"class_weights": "balanced"}, "losses": {"hidden": {}}},
            "task.class_weights is given, which losses.labels alone reads",
        ),
        (
            {"task": {"class_weights": [1, 2], "labels": None, "bounds": [0, 5]}, **LABELS},
            "class_weights and bounds are given",
        ),
        (
            {"task": {"class_weights": "balanced", "labels": ["no", "yes", "maybe"]}, **LABELS},
            "no example to train on is maybe",
        ),
    ],
)
def test_weights_that_fit_nothing_are_refused(
    sections: dict[str, Any], said: str, folder: Path
) -> None:
    if "maybe" in said:
        save_classifier(folder / "three", num_labels=3)
        sections = {**sections, "teacher": {"model": str(folder / "three")}}
    path = write_recipe(folder, "refused", **sections)
    with pytest.raises(fastkd.UserError, match=said):
        fastkd.distill(path, quiet=True)
    assert not (folder / "refused").exists()


def test_the_smallest_weight_counts_one() -> None:
    """A mean depends on their ratios alone, and a step's sum is never small."""
    task = Task(name="tiny", columns=Columns(texts=("a",), label="b"), labels=("x", "y"))
    found = _class_weights((0.02, 0.01), task, encoded([3, 4]))
    assert found is not None and found.tolist() == [2.0, 1.0]
