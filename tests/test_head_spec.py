"""The table of heads: whole, and asked wherever a head decides something."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import transformers

from fastkd.errors import UserError
from fastkd.head_spec import HEADS, TASK_HEAD, heads_of_loss
from fastkd.losses.registry import loss_names
from fastkd.recipe import parse_recipe
from fastkd.types import Head, TaskKind

ROOT = Path(__file__).parents[1] / "fastkd"
# a published method has its head
MAY_NAME = {"types.py", "head_spec.py", "recipe/presets.py"}


def test_every_head_has_a_row_and_its_class_exists() -> None:
    assert tuple(HEADS) == get_args(Head)
    for spec in HEADS.values():
        assert hasattr(transformers, spec.auto_model)
        assert set(spec.losses) <= set(loss_names())
        assert (spec.labels is None) == (not spec.losses)
    assert TASK_HEAD == "sequence_classification"
    assert get_args(TaskKind) == tuple(head for head in HEADS if HEADS[head].data == "task")


def test_which_losses_need_which_heads() -> None:
    classes = "sequence_classification", "token_classification", "question_answering"
    assert heads_of_loss("logits") == (*classes, "causal_lm", "masked_lm")
    assert heads_of_loss("labels") == (*classes, "causal_lm")
    assert heads_of_loss("mlm") == ("masked_lm",)
    assert heads_of_loss("hidden") == ()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", ["logits", "labels", "mlm", "hidden"])
def test_a_recipe_takes_what_the_table_says(head: Head, loss: str) -> None:
    losses = {"logits": {}, loss: {}} if HEADS[head].language_model else {loss: {}}
    kind = {"kind": head} if HEADS[head].data == "task" else {}
    classed = HEADS[head].labels in ("example", "token")
    own = {"columns": {"texts": "a", "label": "b"}, **({"labels": ["O", "B-X"]} if classed else {})}
    task = {"name": "own", "source": "x", **own, **kind}
    data = {"task": task} if HEADS[head].data == "task" else {"data": {"train": "x"}}
    tree = {
        **data,
        "teacher": {"model": "x"},
        "student": {"layers": 2, "head": head},
        "losses": losses,
        "run": {"output": "x"},
    }
    heads = heads_of_loss(loss)
    if not heads or head in heads:
        assert parse_recipe(tree).student.head == head
    else:
        with pytest.raises(UserError, match=f"losses.{loss} is on, but student.head is {head}; "):
            parse_recipe(tree)


def test_no_other_module_decides_by_the_name_of_a_head() -> None:
    names = re.compile("|".join(f'"{head}"' for head in HEADS if head != "none"))
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if names.search(path.read_text(encoding="utf-8"))
    }
    # it runs one to find words for the gaps that it made
    assert found - MAY_NAME == {"data/augmentation/masked_lm.py"}
