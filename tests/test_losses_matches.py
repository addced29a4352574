"""Losses under names of their own, pairs with weights, and projections of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_recipe import refusal, tree
from torch import Tensor

from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.layer_map.sections import PairsSection
from fastkd.losses import DIVISORS, ModelPair
from fastkd.losses.factory import make_objective
from fastkd.losses.objective import Objective
from fastkd.recipe import Losses, Train, load_recipe, parse_recipe
from fastkd.training.optimizer import parameter_groups

NARROW, WIDE, TOKENS = 6, 8, 5
PAIRS = [[1, 2], [1, 4], {"student": 2, "teacher": 3, "weight": 0.5}]


class Config:
    """Of a model that no one runs."""

    def __init__(self, depth: int, width: int) -> None:
        self.num_attention_heads, self.num_labels = 1, 2
        self.num_hidden_layers, self.hidden_size = depth, width


def objective(losses: dict[str, Any], widths: tuple[int, int] = (NARROW, WIDE)) -> Objective:
    torch.manual_seed(4)
    models: list[Any] = [
        type("Model", (), {"config": Config(depth, width)})
        for depth, width in zip((2, 4), widths, strict=True)
    ]
    traits: Any = [type("Traits", (), dict.fromkeys(("shapes", "sinks", "windows"), ()))] * 2
    for found in traits:
        found.causal, found.unknown, found.differs = False, None, None
    layers = make_layer_map("uniform", 2, 4)
    made = make_objective(Losses.model_validate(losses), layers, *models, traits)
    return made.double()


def states(widths: tuple[int, int] = (NARROW, WIDE)) -> tuple[Capture, Capture]:
    generator = torch.Generator().manual_seed(1)

    def drawn(depth: int, width: int) -> Capture:
        shape = (3, TOKENS, width)
        return Capture(
            hidden={
                layer: torch.randn(shape, generator=generator, dtype=torch.float64)
                for layer in range(depth + 1)
            }
        )

    return drawn(2, widths[0]), drawn(4, widths[1])


def run(made: Objective, widths: tuple[int, int] = (NARROW, WIDE)) -> tuple[Tensor, Tensor, Tensor]:
    inputs = {"input_ids": torch.ones(3, TOKENS, dtype=torch.long)}
    total, values = made(*states(widths), inputs, torch.ones(len(DIVISORS)).double())
    return total, values[0], values[1]


def parameters(made: Objective) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in made.named_parameters()}


LOW = {"loss": "hidden", "kind": "cosine", "layer_map": [2, 0], "weight": 3.0}
HIGH = {"loss": "hidden", "kind": "mse", "layer_map": [0, 4], "weight": 0.5}


def alone(section: dict[str, Any], weights: dict[str, Tensor]) -> Tensor:
    made = objective({"hidden": {k: v for k, v in section.items() if k != "loss"}})
    made.load_state_dict(weights, strict=False)
    return run(made)[2]


def test_matches_of_one_loss_are_those_computed_apart() -> None:
    both = objective({"low": LOW, "high": HIGH})
    assert both.labels == ("high/2-4", "low/1-2")
    assert parameters(both).keys() == {"terms.0.weight_0", "terms.0.bias_0"}
    weights = both.state_dict()
    total, _, weighted = run(both)
    apart = torch.cat([alone(HIGH, weights), alone(LOW, weights)])
    torch.testing.assert_close(weighted, apart, rtol=1e-12, atol=0)
    torch.testing.assert_close(total.detach(), apart.sum(), rtol=1e-12, atol=0)


def test_the_order_of_a_file_changes_nothing() -> None:
    one, other = (
        objective(losses)
        for losses in (
            {"high": HIGH, "embedding": {}, "hidden": {}, "attention_2": {"loss": "embedding"}},
            {"attention_2": {"loss": "embedding"}, "hidden": {}, "high": HIGH, "embedding": {}},
        )
    )
    assert one.labels == other.labels
    assert one.labels[:2] == ("hidden/1-2", "hidden/2-4")
    assert torch.equal(run(one)[1], run(other)[1])


def test_names_come_back_from_a_dumped_recipe() -> None:
    losses = {"low": LOW, "hidden": {}, "balance": {"kind": "ratio", "reference": "low"}}
    recipe = parse_recipe(tree(losses=losses))
    dumped = recipe.model_dump(mode="json")
    assert dumped["losses"]["low"]["loss"] == "hidden"
    assert "loss" not in dumped["losses"]["hidden"]
    again = parse_recipe(dumped)
    assert again == recipe
    assert list(again.losses.terms) == ["hidden", "low"]


def test_an_override_switches_a_loss_of_its_own_name_off(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(losses={"low": LOW})))
    recipe = load_recipe(path, ["losses.low=null", "losses.high={loss: hidden}"])
    assert list(recipe.losses.terms) == ["hidden", "high"]
    with pytest.raises(UserError, match=r"losses.lo: unknown key"):
        load_recipe(path, ["losses.lo=null"])


@pytest.mark.parametrize("given", [{"pairs": PAIRS}, PAIRS, {"kind": "pairs", "pairs": PAIRS}])
def test_pairs_are_weighted_one_by_one(given: Any) -> None:
    made = objective({"hidden": {"layer_map": given, "weight": 2.0}}, (WIDE, WIDE))
    assert made.labels == ("hidden/1-2", "hidden/1-4", "hidden/2-3")
    assert made.teacher_depth == 4
    total, raw, weighted = run(made, (WIDE, WIDE))
    student, teacher = states((WIDE, WIDE))
    expected = torch.stack(
        [
            (student.hidden[s] - teacher.hidden[t]).square().mean()
            for s, t in ((1, 2), (1, 4), (2, 3))
        ]
    )
    torch.testing.assert_close(raw, expected)
    factors = torch.tensor([2.0, 2.0, 1.0]).double()
    torch.testing.assert_close(weighted, factors * expected)
    torch.testing.assert_close(total, (factors * expected).sum())
    by_label = dict(zip(made.labels, raw.tolist(), strict=True))
    assert made.weights.total(by_label) == pytest.approx(total.item())


def test_a_map_of_pairs_says_what_it_is() -> None:
    section = PairsSection.model_validate({"pairs": PAIRS})
    layers = make_layer_map(section, 2, 4)
    assert layers.rows() == [(1, "2, 4"), (2, "3 (weight 0.5)")]
    # a layer with one teacher starts from it, another from the uniform one
    assert layers.sources() == (2, 3)
    recipe = parse_recipe(tree(layer_map=PAIRS))
    assert recipe.layer_map == section
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([[1, 2], [1, 2, 0.5]], "layer_map: pairs names student layer 1 with teacher layer 2 tw"),
        ([[1]], "layer_map.pairs.0: expected [student layer, teacher layer], and perhaps a wei"),
        ([[0, 1]], "layer_map.pairs.0.student: input should be greater than or equal to 1"),
        ([[1, 2, -1]], "layer_map.pairs.0.weight: input should be greater than or equal to 0"),
        ([[1, 2, float("nan")]], "layer_map.pairs.0.weight: input should be a finite number"),
        ([{"student": 1}], "layer_map.pairs.0.teacher: missing"),
        ([{"student": 1, "teacher": 2, "wieght": 1}], "layer_map.pairs.0.wieght: unknown key; did"),
        ([[3, 2]], "layer_map names student layer 3, but student.layers is 2"),
        ({"pairs": []}, "layer_map: pairs is empty; name at least one"),
        ({"pairs": [[1, 1]], "x": 1}, "layer_map.x: unknown key; expected one of kind, pairs"),
    ],
)
def test_pairs_that_are_none_are_refused(given: Any, expected: str) -> None:
    assert refusal(tree(layer_map=given)).startswith(expected)
    message = refusal(tree(losses={"low": {"loss": "hidden", "layer_map": given}}))
    assert message.startswith(f"losses.low.{expected}")


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([[3, 1]], "names student layer 3, but the student's layers are 1 to 2"),
        ([[1, 5]], "names teacher layer 5, but the teacher's layers are 1 to 4"),
    ],
)
def test_pairs_outside_the_models_are_refused(pairs: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make_layer_map(PairsSection(pairs=pairs), 2, 4)


def test_each_loss_projects_in_its_own_way() -> None:
    made = objective(
        {
            "hidden": {},
            "embedding": {},
            "one": {**LOW, "layer_map": None, "projection": "own"},
            "each": {**HIGH, "layer_map": None, "projection": "per_pair"},
        }
    )
    # shared by hidden states and embeddings, one for each pair of each, one for all of one
    assert made.labels[:6:2] == ("hidden/1-2", "each/1-2", "one/1-2")
    (group,) = made.each()
    assert group.projection_of == [0, 0, 1, 2, 3, 3, 0]
    shapes = {f"terms.0.weight_{i}": (WIDE, NARROW) for i in range(4)}
    assert parameters(made) == shapes | {f"terms.0.bias_{i}": (WIDE,) for i in range(4)}
    raw = run(made)[1]
    student, teacher = states()
    links = [(1, 2), (2, 4)] * 3 + [(0, 0)]
    for number, (s, t) in enumerate(links):
        index = group.projection_of[number]
        weight, bias = (group.get_parameter(f"{kind}_{index}") for kind in ("weight", "bias"))
        projected, target = student.hidden[s] @ weight.mT + bias, teacher.hidden[t]
        squared = (projected - target).square().mean()
        cosine = (1 - torch.cosine_similarity(projected, target, dim=-1)).mean()
        expected = cosine if made.labels[number].startswith("one") else squared
        torch.testing.assert_close(raw[number], expected.detach())


def test_a_loss_of_equal_widths_is_projected_where_it_says_so() -> None:
    made = objective({"hidden": {}, "more": {**LOW, "projection": "own"}}, (WIDE, WIDE))
    (group,) = made.each()
    assert group.projection_of == [None, None, 0]


def test_projections_have_learning_rates_of_their_own() -> None:
    own = {**LOW, "projection": "own", "projection_learning_rate": 0.5}
    made = objective({"hidden": {}, "low": own})
    assert made.parameter_rates() == {"terms.0.weight_1": 0.5, "terms.0.bias_1": 0.5}
    every = objective({"hidden": {}, "low": own, "projection_learning_rate": 0.25})
    assert every.parameter_rates()["terms.0.weight_0"] == 0.25
    module = torch.nn.ModuleDict({"student": torch.nn.Linear(2, 2), "objective": made})
    groups = parameter_groups(module, Train(weight_decay=0.1))
    found = {
        id(p): (group.get("lr"), group["weight_decay"]) for group in groups for p in group["params"]
    }
    names = {name: found[id(p)] for name, p in module.named_parameters()}
    assert names == {
        "student.weight": (None, 0.1),
        "student.bias": (None, 0.0),
        "objective.terms.0.weight_0": (None, 0.1),
        "objective.terms.0.bias_0": (None, 0.0),
        "objective.terms.0.weight_1": (0.5, 0.1),
        "objective.terms.0.bias_1": (0.5, 0.0),
    }


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (
            {"hidden": {"projection_learning_rate": 1.0}},
            "losses.hidden: projection_learning_rate is of projections that no other loss has",
        ),
        (
            {"hidden": {"projection": "shared", "projection_learning_rate": 1.0}},
            "losses.hidden: projection_learning_rate is of projections that no other loss has",
        ),
        ({"projection_learning_rate": 0}, "losses.projection_learning_rate: input should be gr"),
        ({"hidden": {"projection": "linear"}}, "losses.hidden.projection: input should be 'none'"),
    ],
)
def test_rates_that_say_nothing_are_refused(losses: dict[str, Any], expected: str) -> None:
    assert refusal(tree(losses=losses)).startswith(expected)


def test_models_that_need_another_projection_are_refused() -> None:
    with pytest.raises(UserError, match=r"losses.low.projection is none, but the student is 6"):
        objective({"hidden": {}, "low": {**LOW, "projection": "none"}})
    with pytest.raises(UserError, match="projection_learning_rate is given, but nothing is proj"):
        objective({"hidden": {}, "projection_learning_rate": 1.0}, (WIDE, WIDE))


def test_labels_are_learned_once() -> None:
    task = {"task": {"name": "MRPC", "source": "x"}, "data": None}
    given = tree(losses={"labels": {}, "again": {"loss": "labels"}}, **task)
    assert refusal(given).startswith("losses: labels and again are both labels, which a recipe can")


def test_logits_are_compared_in_several_ways() -> None:
    pair = ModelPair((4, 4), head="sequence_classification", outputs=3)
    losses = {"logits": {}, "raw": {"loss": "logits", "kind": "mse"}, "labels": {}}
    made = Objective(Losses.model_validate(losses), make_layer_map("final", 1, 1), pair)
    assert made.labels == ("logits", "raw", "labels")
    student, teacher = (torch.randn(5, 3, dtype=torch.float64) for _ in range(2))
    inputs = {"input_ids": torch.ones(5, 2), "labels": torch.tensor([0, 1, 2, 0, 1])}
    seen = Capture(logits=student), Capture(logits=teacher)
    raw = made(*seen, inputs, torch.ones(len(DIVISORS)).double())[1][0]
    expected = [
        (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean(),
        (student - teacher).square().mean(),
        torch.nn.functional.cross_entropy(student, inputs["labels"]),
    ]
    torch.testing.assert_close(raw, torch.stack(expected))
