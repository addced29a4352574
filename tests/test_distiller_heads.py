"""`Distiller`: which heads are compared, which labels count, and padding on either side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_config
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import fastkd
from fastkd.errors import UserError

SMALL = {"num_hidden_layers": 2, "hidden_size": 24}
MULTI = {"problem_type": "multi_label_classification"}


def named(*names: str) -> dict[str, Any]:
    """What a configuration calls its outputs."""
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def classifiers(
    student: dict[str, Any], teacher: dict[str, Any], auto: Any = AutoModelForSequenceClassification
) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    large = auto.from_config(tiny_config("bert", **teacher)).eval().requires_grad_(False)
    return auto.from_config(tiny_config("bert", **{**SMALL, **student})).eval(), large


@pytest.mark.parametrize(
    ("student", "teacher", "losses", "said"),
    [
        (
            {"num_labels": 3},
            {"num_labels": 5},
            {"logits": {}},
            "losses.logits compares .* the student's gives 3 numbers and the teacher's 5; give",
        ),
        (
            {"num_labels": 1},
            {"num_labels": 3},
            {"soft": {"loss": "logits", "kind": "total_variation"}},
            "losses.soft compares .* the student's gives 1 numbers and the teacher's 3",
        ),
        (
            named("neg", "pos"),
            named("pos", "neg"),
            {"logits": {}},
            "the student's are called neg, pos and the teacher's pos, neg; give heads of one order",
        ),
        (
            {"num_labels": 3},
            {"num_labels": 3, **MULTI},
            {"logits": {}},
            r"losses.logits: kind is kl, .* problem_type .* is multi_label_classification; take ",
        ),
        (
            {"num_labels": 3, "problem_type": "regression"},
            {"num_labels": 3},
            {"logits": {"kind": "mse", "standardize": True}},
            "losses.logits: standardize is on, .* is regression; take kind: mse without",
        ),
        (
            {"num_labels": 3, "problem_type": "single_label_classification"},
            {"num_labels": 3, **MULTI},
            {"logits": {"kind": "mse"}},
            "the student's problem_type is single_label_classification and the teacher's multi_la",
        ),
        (
            {"num_labels": 1, **MULTI},
            {"num_labels": 1},
            {"labels": {}},
            "losses.labels learns one class, or one number, an example, but .* multi_label_clas",
        ),
    ],
)
def test_heads_of_other_outputs_are_refused(
    student: dict[str, Any], teacher: dict[str, Any], losses: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        fastkd.Distiller(*classifiers(student, teacher), losses)
    assert "\n" not in str(refused.value)


def test_tags_of_tokens_are_compared_as_classes_are() -> None:
    models = classifiers({"num_labels": 3}, {"num_labels": 4}, AutoModelForTokenClassification)
    with pytest.raises(UserError, match="the student's gives 3 numbers and the teacher's 4"):
        fastkd.Distiller(*models, {"logits": {}})


@pytest.mark.parametrize(
    ("student", "teacher", "losses"),
    [
        # nothing compares the heads
        ({"num_labels": 3}, {"num_labels": 5}, {"hidden": {}, "labels": {}}),
        # a new head's names say nothing
        ({"num_labels": 2}, named("neg", "pos"), {"logits": {}}),
        (named("Not_Neutral", "neutral"), named("not neutral", "NEUTRAL"), {"logits": {}}),
        ({"num_labels": 1, "problem_type": "regression"}, {"num_labels": 1}, {"labels": {}}),
    ],
)
def test_heads_that_fit_are_taken(
    student: dict[str, Any], teacher: dict[str, Any], losses: dict[str, Any]
) -> None:
    models = classifiers(student, teacher)
    labels = torch.zeros(3, dtype=torch.long)
    with fastkd.Distiller(*models, losses) as distiller:
        assert torch.isfinite(distiller({**tiny_batch(), "labels": labels})[0])


def test_independent_labels_are_compared_by_their_logits() -> None:
    student, teacher = classifiers({"num_labels": 3, **MULTI}, {"num_labels": 3, **MULTI})
    batch = tiny_batch()
    with torch.no_grad(), fastkd.Distiller(student, teacher, {"logits": {"kind": "mse"}}) as own:
        found = own(batch)[0]
        expected = (student(**batch).logits - teacher(**batch).logits).square().mean()
    torch.testing.assert_close(found, expected)


def labelled(outputs: int) -> tuple[PreTrainedModel, fastkd.Distiller]:
    student, teacher = classifiers({"num_labels": outputs}, {"num_labels": outputs})
    return student, fastkd.Distiller(student, teacher, {"labels": {}})


@pytest.mark.parametrize("outputs", [1, 3])
def test_examples_without_a_label_count_nowhere(outputs: int) -> None:
    student, distiller = labelled(outputs)
    batch, counted = tiny_batch((12, 7, 3, 9)), torch.tensor([True, False, True, False])
    labels = torch.tensor([2, -100, 0, -100])
    labels = labels.float() if outputs == 1 else labels
    with distiller:
        loss, parts = distiller({**batch, "labels": labels})
        logits = student(**batch).logits[counted]
    right = labels[counted]
    error = (logits[:, 0] - right).square().mean() if outputs == 1 else cross_entropy(logits, right)
    torch.testing.assert_close(loss, error)
    # cut so that one micro-batch has none, the losses add up to the same
    first, second = (
        {name: value[rows] for name, value in {**batch, "labels": labels}.items()}
        for rows in ([0, 2], [1, 3])
    )
    counts = distiller.count(first) + distiller.count(second)
    with distiller:
        losses = [distiller(half, counts=counts)[0] for half in (first, second)]
        losses[1].backward()
    assert losses[1] == 0
    torch.testing.assert_close(losses[0].detach(), parts["labels"])
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def on_the_left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with its padding on the other side, at the same positions."""
    valid = batch["attention_mask"].sum(dim=1).tolist()
    width = batch["input_ids"].shape[1]
    turned = {
        name: torch.stack([row.roll(width - size) for row, size in zip(value, valid, strict=True)])
        for name, value in batch.items()
    }
    positions = (turned["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return {**turned, "position_ids": positions}


@pytest.mark.parametrize("told", [False, True])
def test_padding_on_the_left_of_a_causal_model_changes_nothing(told: bool) -> None:
    torch.manual_seed(0)
    teacher, student = (
        AutoModelForCausalLM.from_config(tiny_config("llama", **changes)).eval()
        for changes in ({}, SMALL)
    )
    losses = {"logits": {}, "labels": {}, "hidden": {}, "attention": {"kind": "kl"}}
    distiller = fastkd.Distiller(student, teacher.requires_grad_(False), losses, tokens=12)
    batch = tiny_batch((12, 7, 3))
    if told:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"] = labels
    turned = on_the_left(batch)
    with torch.no_grad(), distiller:
        (_, right), (_, left) = distiller(batch), distiller(turned)
        logits = student(**{k: v for k, v in turned.items() if k != "labels"}).logits
    assert torch.equal(distiller.count(turned), distiller.count(batch))
    for label, value in right.items():
        torch.testing.assert_close(left[label], value, rtol=1e-4, atol=1e-6)
    shown = turned["attention_mask"].bool()
    counted = shown[:, :-1] & shown[:, 1:]
    found = cross_entropy(logits[:, :-1][counted], turned["input_ids"][:, 1:][counted])
    torch.testing.assert_close(left["labels"], found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForTokenClassification])
def test_labels_at_padding_count_nowhere(auto: Any) -> None:
    student, teacher = classifiers({}, {}, auto)
    hard = "mlm" if auto is AutoModelForMaskedLM else "labels"
    batch = tiny_batch((12, 7, 3))
    labels = torch.ones_like(batch["input_ids"])
    blank = labels.masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad(), fastkd.Distiller(student, teacher, {"logits": {}, hard: {}}) as own:
        found, expected = ({**batch, "labels": given} for given in (labels, blank))
        assert torch.equal(own.count(found), own.count(expected))
        assert own(found)[1] == own(expected)[1]


@pytest.mark.parametrize("losses", [{"hidden": {"tokens": "cls"}}, {"rkd": {"pooling": "cls"}}])
def test_the_first_token_is_none_of_the_padding(losses: dict[str, Any]) -> None:
    student, teacher = classifiers({}, {})
    batch = tiny_batch((12, 7, 3))
    turned = on_the_left(batch)
    with torch.no_grad(), fastkd.Distiller(student, teacher, losses) as distiller:
        (_, right), (_, left) = distiller(batch), distiller(turned)
    for label, value in right.items():
        torch.testing.assert_close(left[label], value, rtol=1e-4, atol=1e-6)


def test_a_mask_of_other_numbers_counts_its_tokens() -> None:
    student, teacher = classifiers({}, {})
    distiller = fastkd.Distiller(student, teacher, {"hidden": {}, "attention": {}})
    batch = tiny_batch((12, 7, 3))
    numbered = {**batch, "attention_mask": batch["attention_mask"] * torch.tensor([[1], [2], [3]])}
    assert torch.equal(distiller.count(numbered), distiller.count(batch))
    with torch.no_grad(), distiller:
        assert distiller(numbered)[1] == distiller(batch)[1]
