"""Attention terms against the probabilities that the models give when they run eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.capture import capture, capture_keywords, try_model
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.losses import DIVISORS, ModelPair
from fastkd.losses.objective import Objective
from fastkd.models import build_student
from fastkd.recipe import Losses, Student

# padding within the windows: eager attention makes NaN of a row that sees nothing
LENGTHS = (12, 11, 10)
BATCH = tiny_batch(LENGTHS)
KINDS = ("kl", "reverse_kl", "js", "mse", "cross_entropy", "cosine")
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}


def probabilities(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """Attention maps [batch, heads, tokens, tokens] of every block, by the model's eager code."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps: tuple[Tensor, ...] = model(
            **BATCH, **capture_keywords(model), output_attentions=True
        ).attentions
    return maps


def divergence(p: Tensor, t: Tensor, kind: str) -> Tensor:
    """Of one row of the student's probabilities from the teacher's, over keys that are seen."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum()

    if kind == "js":
        return (kl(t, (p + t) / 2) + kl(p, (p + t) / 2)) / 2
    if kind == "mse":
        return (p - t).square().sum()
    if kind == "cosine":
        return 1 - (p @ t) / (p.norm() * t.norm())
    if kind == "cross_entropy":
        return -(t * p.log()).sum()
    return kl(t, p) if kind == "kl" else kl(p, t)


def defined(own: Tensor, target: Tensor, kind: str) -> float:
    """Mean over heads and valid rows."""
    values = []
    for number, length in enumerate(LENGTHS):
        for head in range(own.shape[1]):
            for row in range(length):
                p, t = own[number, head, row], target[number, head, row]
                seen = t > 0
                assert torch.equal(seen, p > 0)
                values.append(divergence(p[seen], t[seen], kind))
    return float(torch.stack(values).mean())


def compared(name: str, layer_map: Any, losses: dict[str, Any], **changes: Any) -> Any:
    """Student, teacher, and the raw losses of an objective between them."""
    teacher = tiny_model(name, **changes).double().requires_grad_(False)
    layers = make_layer_map(layer_map, 2, 4)
    torch.manual_seed(1)
    student = build_student(teacher, Student(layers=2, init="random"), layers)[0].double().eval()
    traits = [try_model(model, BATCH["input_ids"].shape[1]) for model in (student, teacher)]
    windows = traits[0].windows, traits[1].windows
    pair = ModelPair((32, 32), traits[1].causal, (4, 4), windows)
    objective = Objective(Losses.model_validate(losses), layers, pair)
    seen = []
    for model, side in ((student, "student"), (teacher, "teacher")):
        with torch.no_grad(), capture(model, **objective.layers(side)) as states:
            model(**BATCH, **capture_keywords(model))
        seen.append(states)
    raw = objective(*seen, BATCH, torch.ones(len(DIVISORS)))[1][0]
    return student, teacher, raw


@pytest.mark.parametrize(
    ("name", "changes"),
    [("bert", {}), ("gpt2", {}), ("qwen2", {}), ("qwen2", SLIDING), ("modernbert", {})],
    ids=["bert", "gpt2", "qwen2", "qwen2 with windows", "modernbert"],
)
def test_divergences_are_those_of_the_models_own_maps(name: str, changes: dict[str, Any]) -> None:
    for kind in KINDS:
        given = compared(name, "uniform", {"attention": {"kind": kind}}, **changes)
        student, teacher, raw = given
        own, target = probabilities(student), probabilities(teacher)
        expected = [defined(own[s - 1], target[t - 1], kind) for s, t in ((1, 2), (2, 4))]
        assert raw.tolist() == pytest.approx(expected, rel=1e-6)


def test_local_attention_is_not_compared_with_global_attention() -> None:
    with pytest.raises(UserError, match="student layer 1 attends within 3 tokens and teacher l"):
        compared("modernbert", "mean_loss", {"attention": {"kind": "kl"}})
    # scores have no softmax, so every pair can be compared
    compared("modernbert", "mean_loss", {"attention": {}})


@pytest.mark.parametrize("has", ["student", "teacher"])
def test_attention_with_sinks_is_not_compared_with_attention_without(has: str) -> None:
    first, none = frozenset({1}), frozenset[int]()
    models = ModelPair((8, 8), sinks=(first, none) if has == "student" else (none, first))

    def made(**section: Any) -> Objective:
        losses = Losses.model_validate({"attention": section})
        return Objective(losses, make_layer_map([1, 2], 2, 4), models)

    with pytest.raises(UserError, match=r"layer 1 has .*sinks, so their"):
        made(kind="kl")
    # a sink takes its share in the softmax alone
    assert made().labels == ("attention/1-1", "attention/2-2")


def test_the_mean_of_scores_is_the_target_of_mean_target() -> None:
    student, teacher, raw = compared("bert", "mean_target", {"attention": {}})

    def scores(model: PreTrainedModel) -> list[Tensor]:
        with torch.no_grad(), capture(model, attention=range(1, 5)[: len(maps(model))]) as states:
            model(**BATCH)
        return [s.query @ s.key.mT * s.scale for _, s in sorted(states.attention.items())]

    def maps(model: PreTrainedModel) -> Any:
        return model.encoder.layer

    own, target = scores(student), scores(teacher)
    for number, block in enumerate(((0, 1), (2, 3))):
        mean = torch.stack([target[t] for t in block]).mean(0)
        squares = [(own[number] - mean)[b, :, :n, :n].square() for b, n in enumerate(LENGTHS)]
        entries = sum(n * n for n in LENGTHS) * 4
        expected = sum(float(part.sum()) for part in squares) / entries
        assert float(raw[number]) == pytest.approx(expected, rel=1e-9)
