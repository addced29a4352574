"""Total variation, standardised logits, moving temperatures and Gram matrices, from definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_losses_matches import WIDE, objective, run, states
from test_recipe import refusal, tree
from torch import Tensor

from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.layer_map import Progress, make_layer_map
from fastkd.losses import DIVISORS, ModelPair
from fastkd.losses.objective import Objective
from fastkd.recipe import Losses

WHOLE = torch.ones(len(DIVISORS)).double()


def classified(losses: dict[str, Any], outputs: int = 4, steps: int = 1) -> Objective:
    pair = ModelPair((4, 4), head="sequence_classification", outputs=outputs)
    layers = make_layer_map("final", 1, 1)
    return Objective(Losses.model_validate(losses), layers, pair, steps=steps)


def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) * 3
    return student.requires_grad_(), teacher


def of_logits(made: Objective, student: Tensor, teacher: Tensor) -> Tensor:
    inputs = {"input_ids": torch.ones(len(student), 2)}
    total: Tensor = made(Capture(logits=student), Capture(logits=teacher), inputs, WHOLE)[0]
    return total


def check(total: Tensor, expected: Tensor, student: Tensor) -> None:
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)
    (found,) = torch.autograd.grad(total, student)
    (gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_total_variation_is_half_the_absolute_difference(scaled: bool) -> None:
    student, teacher = logits()
    section = {"kind": "total_variation", "temperature": 2.0, "scale_by_temperature": scaled}
    total = of_logits(classified({"logits": section}), student, teacher)
    rows = []
    for s, t in zip(student, teacher, strict=True):
        p, q = (s / 2).exp() / (s / 2).exp().sum(), (t / 2).exp() / (t / 2).exp().sum()
        rows.append(sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2)
    check(total, torch.stack(rows).mean() * (4 if scaled else 1), student)


def standard(row: Tensor) -> Tensor:
    mean = row.sum() / len(row)
    deviation = ((row - mean).square().sum() / len(row)).sqrt()
    return (row - mean) / (deviation + 1e-7)


@pytest.mark.parametrize("kind", ["kl", "mse", "total_variation"])
def test_standardised_logits_have_neither_mean_nor_scale(kind: str) -> None:
    student, teacher = logits()
    temperature = 1.0 if kind == "mse" else 2.0
    section = {"kind": kind, "standardize": True, "temperature": temperature}
    total = of_logits(classified({"logits": section}), student, teacher)
    rows = []
    for s, t in zip(student, teacher, strict=True):
        s, t = standard(s) / temperature, standard(t) / temperature
        p, q = s.softmax(0), t.softmax(0)
        rows.append(
            {
                "kl": (q * (q.log() - p.log())).sum(),
                "mse": (s - t).square().mean(),
                "total_variation": (p - q).abs().sum() / 2,
            }[kind]
        )
    check(total, torch.stack(rows).mean(), student)
    again = of_logits(classified({"logits": section}), student * 5 - 3, teacher * 0.5 + 7)
    torch.testing.assert_close(again, total, rtol=1e-5, atol=1e-7)


def test_equal_logits_have_a_finite_gradient_when_standardised() -> None:
    student = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    of_logits(classified({"logits": {"standardize": True}}), student, logits()[1][:2]).backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_a_temperature_moves_over_the_run_as_a_weight_does() -> None:
    student, teacher = logits()
    schedule = {"kind": "linear", "first": 1.0, "last": 0.25}
    section = {"temperature": 4.0, "temperature_schedule": schedule, "scale_by_temperature": True}
    made = classified({"logits": section}, steps=10)
    for step, temperature in ((0, 4.0), (5, 2.5), (10, 1.0)):
        made.at(Progress(step))
        fixed = {"temperature": temperature, "scale_by_temperature": True}
        expected = of_logits(classified({"logits": fixed}), student, teacher)
        assert torch.equal(of_logits(made, student, teacher), expected)


def test_gram_matrices_go_from_each_layer_to_the_next() -> None:
    made = objective({"fsp": {"layer_map": [1, 4], "weight": 2.0}}, (WIDE, WIDE))
    assert made.labels == ("fsp/1-1..2-4",)
    assert made.teacher_depth == 4
    _, raw, weighted = run(made, (WIDE, WIDE))
    student, teacher = states((WIDE, WIDE))
    rows = []
    for number in range(3):
        pair = []
        for seen, first, second in ((student, 1, 2), (teacher, 1, 4)):
            a, b = seen.hidden[first][number], seen.hidden[second][number]
            flow = torch.zeros(WIDE, WIDE, dtype=torch.float64)
            for token in range(len(a)):
                flow = flow + a[token][:, None] * b[token][None, :]
            pair.append(flow / len(a))
        rows.append((pair[0] - pair[1]).square().mean())
    torch.testing.assert_close(raw, torch.stack(rows).mean().reshape(1))
    torch.testing.assert_close(weighted, 2 * raw)


def test_padding_and_cuts_change_no_gram_matrix() -> None:
    made = objective({"fsp": {}}, (WIDE, WIDE))
    student, teacher = states((WIDE, WIDE))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    given = {"input_ids": torch.ones(3, 5, dtype=torch.long), "attention_mask": mask}

    def value(rows: slice, tokens: int = 5) -> Tensor:
        seen = [
            Capture(hidden={i: state[rows, :tokens] for i, state in side.hidden.items()})
            for side in (student, teacher)
        ]
        part = {name: tensor[rows, :tokens] for name, tensor in given.items()}
        return made(*seen, part, made.divisors(part) / made.divisors(given).clamp(min=1))[0]

    whole = value(slice(0, 3))
    torch.testing.assert_close(value(slice(0, 1)) + value(slice(1, 3)), whole)
    torch.testing.assert_close(value(slice(0, 1), 3), value(slice(0, 1)))


@pytest.mark.parametrize(
    ("losses", "widths", "expected"),
    [
        ({"fsp": {}}, (6, 8), "compares matrices of the models' widths, but the student is 6"),
        ({"fsp": {"layer_map": "final"}}, (8, 8), "goes from each mapped layer to the next"),
        ({"fsp": {"layer_map": "mean_loss"}}, (8, 8), "goes from each mapped layer to the next"),
        ({"fsp": {"layer_map": "emd"}}, (8, 8), "goes from each mapped layer to the next"),
    ],
)
def test_maps_and_models_without_a_flow_are_refused(
    losses: dict[str, Any], widths: tuple[int, int], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        objective(losses, widths)


def test_one_number_has_no_deviation() -> None:
    with pytest.raises(UserError, match="standardize is on, but the models' heads give one"):
        classified({"logits": {"kind": "mse", "standardize": True}}, outputs=1)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (
            {"logits": {"kind": "total_variation"}},
            "losses.logits has kind: total_variation, which is computed for sequence_class",
        ),
        (
            {"logits": {"kind": "js", "beta": 1 - 1e-5}},
            "losses.logits: beta is 0.99999, so near an end of the mixture that fp32 loses",
        ),
        ({"logits": {"standardize": True}}, "losses.logits has standardize, which is computed"),
        (
            {"logits": {"temperature_schedule": {"last": 0}}},
            "losses.logits: temperature_schedule takes the temperature to 0, expected 0.001 to",
        ),
        (
            {"logits": {"kind": "mse", "temperature_schedule": {}}},
            "losses.logits: temperature_schedule is given, but mse compares raw logits; leave it",
        ),
        (
            {"attention": {"temperature_schedule": {"last": 2}}},
            "losses.attention: temperature_schedule is given, but score_mse has no softmax",
        ),
        (
            {"relations": {"temperature_schedule": {"first": 1e9}}},
            "losses.relations: temperature_schedule takes the temperature to 1e+09, expected",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(losses: dict[str, Any], expected: str) -> None:
    given = tree(losses=losses, student={"head": "causal_lm"})
    assert refusal(given).startswith(expected)
