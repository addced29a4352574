"""The output of any submodule is captured by its path, and its hook is gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recipe import refusal, tree
from tiny_models import LAYERS, tiny_batch, tiny_model
from torch import Tensor, nn

from fastkd.capture import capture, try_model
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.losses import DIVISORS
from fastkd.losses.factory import make_objective
from fastkd.losses.objective import DistilledStudent
from fastkd.models import build_student
from fastkd.recipe import Losses, Student, parse_recipe

BATCH = tiny_batch((7, 4))
PATHS = {"student_module": "encoder.layer.0.output", "teacher_module": "encoder.layer.2.attention"}


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def run(losses: dict[str, Any], width: int | None = None) -> tuple[Any, ...]:
    """Student, teacher, objective, and raw losses through the module that trains."""
    teacher = tiny_model("bert").requires_grad_(False)
    layers = make_layer_map("uniform", 2, LAYERS)
    torch.manual_seed(1)
    student = build_student(teacher, Student(layers=2, hidden_size=width), layers)[0].eval()
    traits = try_model(student), try_model(teacher)
    made = make_objective(Losses.model_validate(losses), layers, student, teacher, traits)
    for model in (student, teacher, made):
        model.double()
    with torch.no_grad(), capture(teacher, **made.layers("teacher")) as seen:
        teacher(**BATCH)
    before = hooks(student)
    total, values = DistilledStudent(student, made)(BATCH, seen, torch.ones(len(DIVISORS)))
    assert hooks(student) == before
    return student, teacher, made, total, values[0]


def outputs(model: nn.Module, path: str) -> Tensor:
    """What a module gives, by a hook of the test's own."""
    found: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda *given: found.append(given[2]))
    model(**BATCH)
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


@pytest.mark.parametrize("width", [None, 24])
def test_modules_are_compared_in_place_of_layers(width: int | None) -> None:
    student, teacher, made, total, raw = run(
        {"hidden": {}, "inner": {"loss": "hidden", **PATHS}}, width
    )
    assert made.labels == ("hidden/1-2", "hidden/2-4", "inner")
    assert made.teacher_depth is None
    own = outputs(student, PATHS["student_module"])
    target = outputs(teacher, PATHS["teacher_module"])
    if width is not None:
        (group,) = made.each()
        own = own @ group.weight_0.mT + group.bias_0
    valid = BATCH["attention_mask"].bool()
    expected = (own - target)[valid].square().mean()
    torch.testing.assert_close(raw[2], expected.detach())
    total.backward()
    assert student.encoder.layer[0].output.dense.weight.grad.any()


def test_a_path_that_leads_nowhere_is_refused_with_near_ones() -> None:
    wrong = {**PATHS, "teacher_module": "encoder.layers.2.attention"}
    with pytest.raises(UserError) as refused:
        run({"hidden": wrong})
    message = str(refused.value)
    assert message.startswith(
        "losses.hidden: BertModel has no module 'encoder.layers.2.attention'; did you mean "
    )
    assert "encoder.layer.2.attention" in message
    refused_empty = pytest.raises(UserError, match="has no module ''; did you mean embeddings or")
    with refused_empty, capture(tiny_model("bert"), modules=[""]):
        pass


def test_hooks_are_removed_when_a_pass_fails() -> None:
    model = tiny_model("bert")
    before = hooks(model)
    with pytest.raises(RuntimeError, match="stop"), capture(model, modules=["encoder"]):
        # the module's, and the guard of the model's passes
        assert hooks(model) == before + 2
        raise RuntimeError("stop")
    assert hooks(model) == before


def test_what_gives_no_one_tensor_is_refused() -> None:
    model = tiny_model("bert")
    no_tensor = pytest.raises(UserError, match=r"module encoder \(BertEncoder\) gives BaseModelOut")
    with no_tensor, capture(model, modules=["encoder"]):
        model(**BATCH)
    twice = pytest.raises(UserError, match=r"module embeddings .* is called more than once")
    with twice, capture(model, modules=["embeddings"]):
        model(**BATCH)
        model(**BATCH)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"student_module": "a"}, "losses.hidden: student_module and teacher_module are compared"),
        ({**PATHS, "layer_map": "last"}, "losses.hidden: layer_map and student_module are both gi"),
        ({**PATHS, "student_module": ""}, "losses.hidden.student_module: string should have at l"),
    ],
)
def test_modules_are_given_in_pairs(section: dict[str, Any], expected: str) -> None:
    assert refusal(tree(losses={"hidden": section})).startswith(expected)


def test_modules_come_back_from_a_dumped_recipe() -> None:
    recipe = parse_recipe(tree(losses={"hidden": PATHS}))
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
