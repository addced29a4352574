"""Schedules, running ratios and learned variances, against values and gradients worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.layer_map import Progress, make_layer_map, sections
from fastkd.losses import DIVISORS, ModelPair
from fastkd.losses.objective import Objective
from fastkd.losses.weighting import Uncertainty, factor
from fastkd.recipe import Losses, Schedule, Train, parse_recipe
from fastkd.training.optimizer import parameter_groups

WIDTH, TOKENS, STEPS = 6, 4, 100
INPUTS = {"input_ids": torch.ones(2, TOKENS, dtype=torch.long)}


def states(seed: int, layers: int) -> Capture:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(layers + 1, 2, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return Capture(hidden={layer: made[layer].clone() for layer in range(layers + 1)})


def objective(layer_map: Any = "uniform", **losses: Any) -> Objective:
    given = {"hidden": {"weight": 2.0}, "embedding": {"weight": 5.0}, **losses}
    layers = make_layer_map(layer_map, 2, 4)
    return Objective(Losses.model_validate(given), layers, ModelPair((WIDTH, WIDTH)), steps=STEPS)


class Run:
    """An objective on fixed states, with gradients of the student's."""

    def __init__(self, layer_map: Any = "uniform", **losses: Any) -> None:
        self.objective = objective(layer_map, **losses)
        self.student, self.teacher = states(0, 2), states(1, 4)
        for state in self.student.hidden.values():
            state.requires_grad_()

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        total, values = self.objective(
            self.student, self.teacher, INPUTS, torch.ones(len(DIVISORS), dtype=torch.float64)
        )
        return total, values[0], values[1]

    def mse(self, student: int, teacher: int) -> Tensor:
        return (self.student.hidden[student] - self.teacher.hidden[teacher]).square().mean()


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"kind": "linear"}, {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
        (
            {"kind": "linear", "first": 0, "last": 2, "begin": 0.2, "end": 0.6},
            {0.0: 0.0, 0.2: 0.0, 0.3: 0.5, 0.6: 2.0, 1.0: 2.0},
        ),
        ({"kind": "cosine"}, {0.0: 1.0, 0.25: (1 + math.sqrt(0.5)) / 2, 0.5: 0.5, 1.0: 0.0}),
        ({"kind": "cosine", "first": 2, "last": 4, "begin": 0.5}, {0.4: 2.0, 0.75: 3.0, 1.0: 4.0}),
        (
            {"kind": "step", "first": 1, "last": 3, "begin": 0.5},
            {0.0: 1.0, 0.499: 1.0, 0.5: 3.0, 1.0: 3.0},
        ),
    ],
)
def test_schedules_have_these_values(given: dict[str, Any], values: dict[float, float]) -> None:
    schedule = Schedule.model_validate(given)
    for progress, expected in values.items():
        assert factor(schedule, progress) == pytest.approx(expected, abs=1e-12)
    assert factor(None, 0.3) == 1.0


def test_a_schedule_moves_its_own_term_only() -> None:
    run = Run(hidden={"weight": 2.0, "schedule": {"kind": "linear", "first": 1, "last": 0}})
    for step in (0, 50, 99):
        run.objective.at(Progress(step))
        total, raw, weighted = run()
        moved = 2.0 * (1 - step / STEPS)
        expected = raw * torch.tensor([moved, moved, 5.0], dtype=torch.float64)
        torch.testing.assert_close(weighted, expected)
        torch.testing.assert_close(total.detach(), expected.sum())


@pytest.mark.parametrize("reference", [None, "embedding"])
def test_a_ratio_scales_terms_to_the_reference_by_detached_values(reference: str | None) -> None:
    run = Run(balance={"kind": "ratio", "reference": reference, "decay": 0.9})
    assert run.objective.weights.needs_look
    _, raw, _ = run()
    run.objective.weights.observe(raw)
    assert not run.objective.weights.needs_look
    hidden, embedding = float(raw[:2].sum()), float(raw[2])
    of = hidden if reference is None else embedding
    total, _, weighted = run()
    factors = torch.tensor([2 * of / hidden] * 2 + [5 * of / embedding], dtype=torch.float64)
    torch.testing.assert_close(weighted, factors * raw)
    total.backward()
    # the scales have no gradient: that of the states is 2 (s - t) / n times weight and scale
    for layer, scale, target in ((1, factors[0], 2), (2, factors[1], 4), (0, factors[2], 0)):
        own = run.student.hidden[layer]
        expected = scale * 2 * (own - run.teacher.hidden[target]) / own.numel()
        torch.testing.assert_close(own.grad, expected.detach())


def test_a_ratio_follows_a_running_mean_and_comes_back_from_a_checkpoint() -> None:
    run = Run(balance={"kind": "ratio", "decay": 0.9})
    first, second = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 3.0, 1.0])
    run.objective.weights.observe(first)
    run.objective.weights.observe(second)
    hidden, embedding = 0.9 * 3 + 0.1 * 6, 0.9 * 4 + 0.1 * 1
    _, raw, weighted = run()
    torch.testing.assert_close(weighted[2], 5 * hidden / embedding * raw[2])
    other = Run(balance={"kind": "ratio", "decay": 0.9})
    other.objective.weights.load_feedback(run.objective.weights.feedback(), torch.device("cpu"))
    assert torch.equal(other()[2], weighted)
    assert not other.objective.weights.needs_look


def test_a_term_that_is_zero_keeps_its_scale() -> None:
    run = Run(balance="ratio")
    run.objective.weights.observe(torch.tensor([1.0, 1.0, 0.0]))
    _, raw, weighted = run()
    torch.testing.assert_close(weighted[2], 5 * raw[2])


def test_the_mean_of_a_term_begins_at_its_first_size() -> None:
    run = Run(balance={"kind": "ratio", "decay": 0.9})
    for last in (0.0, 0.0, 1e-6, 3e-6):
        run.objective.weights.observe(torch.tensor([1.0, 1.0, last], dtype=torch.float64))
    _, raw, weighted = run()
    mean = 0.9 * 1e-6 + 0.1 * 3e-6
    torch.testing.assert_close(weighted[2], 5 * 2 / mean * raw[2])
    torch.testing.assert_close(weighted[:2], 2 * raw[:2])


@pytest.mark.parametrize(
    ("reference", "first", "use"),
    [
        ("embedding", [1.0, 1.0, 0.0], "name another reference, such as hidden"),
        (None, [0.0, 0.0, 1.0], "name another reference, such as embedding"),
        (None, [0.0, 0.0, 0.0], "leave balance out"),
    ],
)
def test_a_reference_without_a_size_is_refused(
    reference: str | None, first: list[float], use: str
) -> None:
    run = Run(balance={"kind": "ratio", "reference": reference})
    said = f"all terms to {reference or 'hidden'}, which is 0 before the first step, .*; {use}$"
    with pytest.raises(UserError, match=said):
        run.objective.weights.observe(torch.tensor(first))


def test_uncertainty_has_the_loss_and_the_gradients_of_its_formula() -> None:
    run = Run(balance={"kind": "uncertainty", "limit": 3.0})
    learned = run.objective.uncertainty
    assert learned is not None
    parameters = learned.log_variances
    with torch.no_grad():
        parameters.copy_(torch.tensor([0.7, -1.2]))
    total, raw, weighted = run()
    total.backward()
    sizes = torch.stack([2 * (raw[0] + raw[1]), 5 * raw[2]])
    theta = parameters.detach().double()
    s = 3 * torch.tanh(theta / 3)
    torch.testing.assert_close(
        total.detach(), (torch.exp(-s) * sizes / 2 + s / 2).sum(), rtol=1e-6, atol=1e-8
    )
    slope = 1 - torch.tanh(theta / 3).square()
    expected = slope * (1 - torch.exp(-s) * sizes) / 2
    torch.testing.assert_close(parameters.grad.double(), expected, rtol=1e-5, atol=1e-7)
    scales = torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64) * torch.exp(-s)[[0, 0, 1]] / 2
    torch.testing.assert_close(weighted, scales * raw, rtol=1e-6, atol=1e-8)
    own = run.student.hidden[1]
    gradient = 2 * torch.exp(-s[0]) / 2 * 2 * (own - run.teacher.hidden[2]) / own.numel()
    torch.testing.assert_close(own.grad, gradient.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("how", ["weight", "schedule"])
def test_a_variance_stands_still_while_its_term_is_off(how: str) -> None:
    late = {"kind": "step", "first": 0, "last": 1, "begin": 0.5}
    off = {"weight": 0.0} if how == "weight" else {"weight": 5.0, "schedule": late}
    run = Run(embedding=off, balance={"kind": "uncertainty", "limit": 3.0})
    learned = run.objective.uncertainty
    assert learned is not None
    with torch.no_grad():
        learned.log_variances.copy_(torch.tensor([0.7, -1.2]))
    total, raw, weighted = run()
    total.backward()
    s = 3 * math.tanh(0.7 / 3)
    expected = math.exp(-s) * 2 * float(raw[:2].sum()) / 2 + s / 2
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert float(run.objective.variance_total()) == pytest.approx(s / 2, rel=1e-6)
    assert weighted[2] == 0
    slopes = learned.log_variances.grad
    assert slopes is not None and slopes[0] != 0 and slopes[1] == 0
    if how == "schedule":
        run.objective.at(Progress(STEPS // 2))
        learned.log_variances.grad = None
        run()[0].backward()
        assert learned.log_variances.grad is not None and learned.log_variances.grad[1] != 0


@pytest.mark.parametrize("value", [-50.0, 50.0])
def test_variances_stay_within_their_limit_and_come_back_from_it(value: float) -> None:
    learned = Uncertainty(1, limit=2.0)
    with torch.no_grad():
        learned.log_variances.fill_(value)
    on = torch.ones(1, dtype=torch.bool)
    _, scales = learned(torch.ones(1, dtype=torch.float64), on)
    assert scales.item() == pytest.approx(math.exp(-math.copysign(2.0, value)) / 2, rel=1e-6)
    with torch.no_grad():
        learned.log_variances.fill_(math.copysign(4.0, value))
    learned(torch.full((1,), 1.0, dtype=torch.float64), on)[0].backward()
    # at a loss of 1 the best variance is 1: away from the limit
    assert learned.log_variances.grad is not None
    assert math.copysign(1.0, learned.log_variances.grad.item()) == math.copysign(1.0, value)


def test_variances_train_without_decay_and_are_not_handed_on() -> None:
    made = objective(balance="uncertainty", projection="shared")
    groups = parameter_groups(made, Train(weight_decay=0.1))
    assert made.uncertainty is not None
    parameters = made.uncertainty.log_variances
    (group,) = [g for g in groups if any(p is parameters for p in g["params"])]
    assert group["weight_decay"] == 0.0
    assert "uncertainty.log_variances" in made.state_dict()
    assert list(made.kept()) == ["terms.0.weight_0", "terms.0.bias_0"]


def test_the_mean_of_losses_weighs_links_and_the_mean_of_targets_does_not() -> None:
    by_loss = Run("mean_loss", embedding=None)
    total, raw, weighted = by_loss()
    pairs = [(1, 1), (1, 2), (2, 3), (2, 4)]
    expected = torch.stack([by_loss.mse(s, t) for s, t in pairs]).detach()
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(weighted, 2.0 * 0.5 * raw)
    torch.testing.assert_close(total.detach(), raw.sum())

    by_target = Run("mean_target", embedding=None)
    _, raw, weighted = by_target()
    for number, (s, block) in enumerate(((1, (1, 2)), (2, (3, 4)))):
        target = torch.stack([by_target.teacher.hidden[t] for t in block]).mean(0)
        torch.testing.assert_close(
            raw[number], (by_target.student.hidden[s] - target).square().mean().detach()
        )
    torch.testing.assert_close(weighted, 2.0 * raw)


def test_a_random_map_is_compared_in_its_present_draw() -> None:
    run = Run(sections.RandomSection(redraw="step"), embedding=None)
    seen = set()
    for step in range(12):
        run.objective.at(Progress(step))
        links = run.objective.maps["hidden"].links(Progress(step))
        assert run.objective.layers("teacher")["hidden"] == {link.teachers[0] for link in links}
        expected = torch.stack([run.mse(link.student, link.teachers[0]) for link in links])
        torch.testing.assert_close(run()[1], expected.detach())
        seen.add(tuple(link.teachers[0] for link in links))
    assert len(seen) > 1
    assert run.objective.labels == ("hidden/1-*", "hidden/2-*")


@pytest.mark.parametrize("layer_weights", ["cost", "softmax", "equal"])
def test_a_transport_moves_the_weights_of_layers_as_it_is_told(layer_weights: Any) -> None:
    run = Run(sections.TransportSection(layer_weights=layer_weights, total=3), embedding=None)
    raw = run()[1]
    run.objective.weights.observe(raw)
    flows = []
    for _ in range(2):
        _, raw, weighted = run()
        flows.append((weighted / (2.0 * raw)).view(2, 4))
        assert flows[-1].sum().item() == pytest.approx(3)
        run.objective.weights.observe(raw)
    parts = flows[-1].sum(0) / 3
    if layer_weights == "equal":
        torch.testing.assert_close(parts, torch.full((4,), 0.25).double())
    else:
        assert parts.max() - parts.min() > 1e-3


def test_a_transport_comes_back_from_a_checkpoint_and_counts_in_the_total() -> None:
    run = Run(sections.TransportSection(), embedding=None)
    _, raw, before = run()
    torch.testing.assert_close(before, 2.0 * raw / 8)
    # of a step whose losses are not all finite there is no flow
    run.objective.weights.observe(torch.where(torch.arange(8) == 3, torch.nan, raw))
    assert torch.equal(run()[2], before) and run.objective.weights.needs_look
    run.objective.weights.observe(raw)
    assert not run.objective.weights.needs_look, "a step is looked at before the first alone"
    total, _, weighted = run()
    flow = weighted / (2.0 * raw)
    assert flow.sum().item() == pytest.approx(1)
    torch.testing.assert_close(flow.view(2, 4).sum(0), torch.full((4,), 0.25).double())
    other = Run(sections.TransportSection(), embedding=None)
    other.objective.weights.load_feedback(run.objective.weights.feedback(), torch.device("cpu"))
    assert torch.equal(other()[2], weighted) and not other.objective.weights.needs_look
    # held-out numbers are transported on their own, between equal layers
    by_label = dict(zip(run.objective.labels, raw.tolist(), strict=True))
    assert run.objective.weights.total(by_label) == pytest.approx(total.item())


def test_held_out_totals_know_no_schedule_and_no_balance() -> None:
    schedule = {"kind": "step", "first": 0, "last": 7, "begin": 0.5}
    run = Run(hidden={"weight": 2.0, "schedule": schedule}, balance="uncertainty")
    by_label = {"hidden/1-2": 1.0, "hidden/2-4": 2.0, "embedding/0-0": 3.0}
    for step in (0, 80):
        run.objective.at(Progress(step))
        assert run.objective.weights.total(by_label) == pytest.approx(2 * 3 + 5 * 3)


@pytest.mark.parametrize(
    ("layer_map", "losses", "expected"),
    [
        ("mean_target", {"attention": {"kind": "kl"}}, "layer_map mean_target mixes several"),
        ("mean_target", {"relations": {}}, "losses.relations of this kind can't compare"),
        (sections.AttentionSection(), {"attention": {}}, "layer_map attention mixes several"),
    ],
)
def test_maps_that_a_term_cannot_use_are_refused(
    layer_map: Any, losses: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        objective(layer_map, **losses)


def base(**changes: Any) -> dict[str, Any]:
    return {
        "teacher": {"model": "a"},
        "student": {"layers": 2, **changes.pop("student", {})},
        "losses": {"hidden": {}, **changes.pop("losses", {})},
        "data": {"train": "b"},
        "run": {"output": "c"},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"losses": {"balance": "ratios"}},
            "losses.balance.kind: input should be 'constant'",
        ),
        (
            {"losses": {"balance": {"kind": "ratio", "reference": "mlm"}}},
            "losses: balance.reference is mlm, but that term is off; expected one of hidden",
        ),
        (
            {"losses": {"balance": {"kind": "uncertainty", "decay": 0.5}}},
            "losses.balance: decay is read by ratio only; kind is uncertainty",
        ),
        (
            {"losses": {"hidden": {"schedule": {"begin": 0.5, "end": 0.2}}}},
            "losses.hidden.schedule: begin is 0.5, expected less than end",
        ),
        (
            {"losses": {"hidden": {"schedule": {"kind": "step", "end": 0.2}}}},
            "losses.hidden.schedule: a step has no end",
        ),
        (
            {"losses": {"attention": {"temperature": 2}}},
            "losses.attention: temperature is given, but score_mse has no softmax",
        ),
        (
            {"losses": {"logits": {"skew": 0.3}}, "student": {"head": "causal_lm"}},
            "losses.logits: skew is read by skew_kl only; kind is kl",
        ),
        (
            {"losses": {"logits": {"kind": "js", "beta": 1e-9}}, "student": {"head": "causal_lm"}},
            "losses.logits: beta is 1e-09, so near an end of the mixture that fp32 loses the",
        ),
        (
            {"losses": {"logits": {"kind": "mse", "temperature": 2}}},
            "losses.logits: temperature is given, but mse compares raw logits; leave it out",
        ),
        (
            {"losses": {"relations": {"temperature": 1e4}}},
            "losses.relations.temperature: input should be less than or equal to 1000",
        ),
        (
            {"losses": {"reduction": "tinybert", "hidden": {"kind": "cosine"}}},
            "losses: reduction is tinybert, but hidden.kind is cosine",
        ),
        (
            {"losses": {"logits": {}}},
            "losses.logits is on, but student.head is none; expected sequence_classification or",
        ),
        (
            {"losses": {"mlm": {}}, "student": {"head": "masked_lm"}},
            "losses.mlm of a masked_lm head is computed together with losses.logits",
        ),
        (
            {"losses": {"hidden": {"layer_map": [1]}}},
            "losses.hidden.layer_map names 1 teacher layers, but student.layers is 2",
        ),
        (
            {"layer_map": {"kind": "random", "redrew": "step"}},
            "layer_map.redrew: unknown key; did you mean 'redraw'? expected one of kind, redraw",
        ),
        (
            {"layer_map": {"kind": "emd", "temperature": 2}},
            "layer_map: temperature is read by softmax only, but layer_weights is cost; leave it "
            "out",
        ),
        (
            {"losses": {"hidden": {"layer_map": {"kind": "emd", "temperature": 0}}}},
            "losses.hidden.layer_map.temperature: input should be greater than or equal to 0.001 "
            "(given 0)",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe(base(**changes))
    assert str(refused.value).startswith(f"recipe: {expected}")
