"""Relation heads divide what attention really reads, or are refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastkd_kernels import relation_divergence
from tiny_models import HEADS, NAMES, tiny_batch, tiny_model
from tiny_runs import make_recipe
from tiny_training import fastkd

from fastkd.capture import AttentionShape, capture, capture_keywords, try_model
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.losses import check_relation_heads
from fastkd.losses.factory import make_objective
from fastkd.recipe import parse_recipe

BATCH = tiny_batch((8, 8))
WIDE = {"head_dim": 6, "num_key_value_heads": 2}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", [{}, WIDE], ids=["plain", "wide heads"])
def test_widths_are_those_of_the_captured_tensors(name: str, changes: dict[str, Any]) -> None:
    if changes and name not in ("llama", "qwen3"):
        pytest.skip("no head size of its own")
    model = tiny_model(name, **changes)
    (shape,) = try_model(model).shapes
    with torch.no_grad(), capture(model, attention=[1]) as states:
        model(**BATCH, **capture_keywords(model))
    state = states.attention[1]
    for letter, tensor in (("q", state.query), ("k", state.key), ("v", state.value)):
        assert tensor is not None
        assert shape.width(letter, letter * 2) == tensor.shape[1] * tensor.shape[3]
    assert shape.width("k", "qk") == shape.width("q", "qk") == HEADS * state.query.shape[3]


@pytest.mark.parametrize("relation", ["qq", "kk", "vv", "qk"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32])
def test_the_check_refuses_exactly_what_the_op_refuses(relation: Any, count: int) -> None:
    models = tiny_model("qwen3", **WIDE), tiny_model("qwen3", 1, head_dim=8)
    states = []
    shapes = try_model(models[0]).shapes, try_model(models[1]).shapes
    for model in models:
        with torch.no_grad(), capture(model, attention=[1]) as found:
            model(**BATCH, **capture_keywords(model))
        states.append(found.attention[1])
    try:
        relation_divergence([states[0]], [states[1]], relation=relation, relation_heads=count)
    except ValueError:
        with pytest.raises(UserError, match=f"into {count} relation heads, but the .*{relation} c"):
            check_relation_heads([relation], count, shapes)
    else:
        check_relation_heads([relation], count, shapes)


def test_the_message_names_relation_model_and_width() -> None:
    shapes = (AttentionShape(4, 2, 6, 6),), (AttentionShape(4, 4, 8, 8),)
    with pytest.raises(UserError) as refused:
        check_relation_heads(["qq", "vv"], 8, shapes)
    assert str(refused.value) == (
        "losses.relations cuts vectors into 8 relation heads, but the values that vv compares are "
        "12 wide in the student; set losses.relations.relation_heads to a divisor of all widths"
    )
    check_relation_heads(["qq", "vv"], 4, shapes)


def test_every_shape_of_a_model_is_held_against() -> None:
    shapes = (AttentionShape(4, 2, 6, 6), AttentionShape(4, 2, 6, 5)), (AttentionShape(4, 4, 8, 8),)
    check_relation_heads(["qq", "kk"], 4, shapes)
    with pytest.raises(UserError, match="values that vv compares are 10 wide in the student"):
        check_relation_heads(["vv"], 4, shapes)


def test_heads_wider_than_a_kernel_takes_are_refused_where_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = (AttentionShape(4, 4, 80, 80),), (AttentionShape(4, 4, 64, 64),)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_relation_heads(["qq"], 1, shapes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"heads of up to 256; set .*relation_heads to 2 or more"):
        check_relation_heads(["qq"], 1, shapes)
    check_relation_heads(["qq"], 2, shapes)


def recipe(**relations: Any) -> Any:
    return parse_recipe(
        {
            "teacher": {"model": "t"},
            "student": {"layers": 4},
            "losses": {"relations": relations},
            "data": {"train": "x.txt"},
            "run": {"output": "r"},
        }
    )


def test_the_objective_is_checked_with_real_widths() -> None:
    model = tiny_model("qwen3", **WIDE)
    traits = try_model(model), try_model(model)
    layers = make_layer_map("uniform", 4, 4)
    # 32 wide hidden states, 24 wide queries, 12 wide keys and values
    make_objective(recipe(relation_heads=12).losses, layers, model, model, traits)
    make_objective(recipe(relation_heads=24, relations=["qq"]).losses, layers, model, model, traits)
    with pytest.raises(UserError, match="the queries that qq compares are 24 wide in the student"):
        make_objective(recipe(relation_heads=16).losses, layers, model, model, traits)
    with pytest.raises(UserError, match="the keys that kk compares are 12 wide in the student"):
        make_objective(recipe(relation_heads=8).losses, layers, model, model, traits)


def test_the_run_is_refused_before_its_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(
        tmp_path,
        "qwen3",
        student={"hidden_size": None, "intermediate_size": None},
        losses={"attention": None, "relations": {"relation_heads": 32}},
    )
    assert fastkd("distill", str(path), monkeypatch=monkeypatch) == 2
    assert "keys that kk compares are 16 wide in the student" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
