"""Losses are found by name, register themselves, and are refused in one line where they can't."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_recipe import refusal, tree
from torch import Tensor

from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.layer_map.sections import MAP_SECTIONS, LayerPair
from fastkd.losses import (
    DIVISORS,
    Batch,
    Captures,
    Loss,
    LossConfig,
    ModelPair,
    register_loss,
    registry,
)
from fastkd.losses.hidden import HiddenLoss
from fastkd.losses.objective import Objective
from fastkd.recipe import Losses, parse_recipe
from fastkd.section import Section


@pytest.fixture(autouse=True)
def own_losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    registry.loss_names()
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    yield


def first_tokens(value: Any = None) -> type[Loss]:
    """A loss of one value: the squared difference of first states, or what it is told to give."""

    class FirstTokens(Loss):
        class Config(LossConfig):
            factor: float = 1.0

        config: Config
        captures = Captures(logits=True)

        def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
            if value is not None:
                return value  # type: ignore[no-any-return]
            assert isinstance(student.logits, Tensor) and isinstance(teacher.logits, Tensor)
            return self.config.factor * (student.logits - teacher.logits).square().mean()

    return FirstTokens


def objective(**losses: Any) -> Objective:
    given = Losses.model_validate(losses)
    return Objective(given, make_layer_map("uniform", 2, 4), ModelPair((8, 8)))


def values(made: Objective) -> Tensor:
    student, teacher = (Capture(logits=torch.arange(6.0).reshape(3, 2) * n) for n in (1, 3))
    inputs = {"input_ids": torch.ones(3, 4, dtype=torch.long)}
    return made(student, teacher, inputs, torch.ones(len(DIVISORS)))[1][0]


def test_a_registered_loss_is_a_section_of_a_recipe() -> None:
    register_loss("first_tokens")(first_tokens())
    recipe = parse_recipe(tree(losses={"first_tokens": {"factor": 2.0}}))
    dumped = recipe.model_dump(mode="json")["losses"]
    assert dumped["first_tokens"] == {"weight": 1.0, "schedule": None, "factor": 2.0}
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    made = objective(first_tokens={"factor": 2.0})
    expected = 2 * (2 * torch.arange(6.0)).square().mean()
    torch.testing.assert_close(values(made), expected.reshape(1))
    assert made.labels == ("first_tokens",)
    message = refusal(tree(losses={"first_tokens": {"facter": 1}}))
    assert message.startswith("losses.first_tokens.facter: unknown key; did you mean 'factor'?")


@pytest.mark.parametrize(
    ("value", "given"),
    [
        (3.0, "gives float"),
        (torch.ones(2), r"gives a tensor of shape \[2\]"),
        (torch.ones(1, 1), r"gives a tensor of shape \[1, 1\]"),
    ],
    ids=["number", "two", "matrix"],
)
def test_a_loss_of_another_shape_is_refused(value: Any, given: str) -> None:
    register_loss("first_tokens")(first_tokens(value))
    with pytest.raises(UserError, match=rf"losses.first_tokens: .*{given}; expected .*\[\] or"):
        values(objective(first_tokens={}))


def test_a_name_is_given_once() -> None:
    register_loss("mine")(first_tokens())
    with pytest.raises(UserError, match="a loss hidden is registered already"):
        register_loss("hidden")(first_tokens())

    class Other(HiddenLoss):
        pass

    with pytest.raises(UserError, match="a loss mine is registered already"):
        register_loss("mine")(Other)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a/b", "1a", "ä"])
def test_a_name_is_a_key_of_a_recipe_and_a_label(name: str) -> None:
    with pytest.raises(UserError, match="give a name of letters"):
        register_loss(name)
    assert "losses." in refusal(tree(losses={name: {"loss": "hidden"}}))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"hiden": {}}, "losses.hiden: unknown key; did you mean 'hidden'? expected one of atten"),
        ({"hiden": None}, "losses.hiden: unknown key; did you mean 'hidden'? expected one of atte"),
        ({"terms": {}}, "losses.terms: unknown key; expected one of attention, relations"),
        ({"balanced": {}}, "losses.balanced: unknown key; did you mean 'balance'?"),
        ({"low": {"loss": "hiden"}}, "losses.low: no loss 'hiden'; did you mean 'hidden'?"),
        ({"low": {"loss": 3}}, "losses.low: loss is 3; expected one of attention"),
        ({"hidden": {"weight": "x"}}, "losses.hidden.weight: input should be a valid number"),
        ({3: {}}, "losses.3: keys should be strings (given 3)"),
        ({"attention": HiddenLoss.Config()}, "losses.attention: expected the section of attention"),
    ],
)
def test_unknown_losses_are_refused_with_a_suggestion(
    losses: dict[str, Any], expected: str
) -> None:
    assert refusal(tree(losses=losses)).startswith(expected)


def test_a_section_that_is_made_in_python_is_one_too() -> None:
    assert Losses.model_validate({"hidden": HiddenLoss.Config(weight=2)}) == Losses.model_validate(
        {"hidden": {"weight": 2}}
    )


SECTIONS = [*(registry.loss_class(name).Config for name in registry.loss_names())]
SECTIONS += [*MAP_SECTIONS.values(), LayerPair]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__qualname__)
def test_every_field_is_described_in_a_sentence(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        assert (field.description or "").endswith("."), name


def test_reading_no_recipe_loads_no_torch() -> None:
    code = "import sys, fastkd.cli, fastkd.recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_reading_a_recipe_loads_no_transformers() -> None:
    code = (
        "import sys; from fastkd.recipe import Losses; Losses.model_validate({'hidden': {}});"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_loss_may_not_be_called_as_another_key_of_the_section() -> None:
    assert set(registry.OTHER_KEYS) == set(Losses.model_fields)
