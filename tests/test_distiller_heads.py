"""`Distiller` with models that have heads: which are compared, which labels count, and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_config
from transformers import (
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
