"""The objective equals its definition with full attention maps, however a step is cut."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from tiny_models import LAYERS, WIDTH, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture import Capture, capture, capture_keywords, route_attention, try_model
from fastkd.errors import UserError
from fastkd.layer_map import LayerMap, make_layer_map
from fastkd.losses import DIVISORS, LossInfo, ModelPair, count_divisors, model_inputs
from fastkd.losses.objective import Objective
from fastkd.losses.states import StateGroup
from fastkd.models import build_student
from fastkd.recipe import Losses, Student
from fastkd.types import Inputs

Reduction = Literal["valid", "tinybert"]
REDUCTIONS: tuple[Reduction, ...] = ("valid", "tinybert")
BATCH = tiny_batch((12, 7, 3, 9))
NARROW = 24
NOTHING = {"logits": False, "outputs": False, "modules": set()}
WHOLE = torch.ones(len(DIVISORS))
ALL_TERMS = {"attention": {"weight": 1.0}, "hidden": {"weight": 10.0}, "embedding": {"weight": 3.0}}


def uniform() -> LayerMap:
    return make_layer_map("uniform", 2, LAYERS)


def make_objective(
    *, widths: tuple[int, int] = (NARROW, WIDTH), causal: bool = False, **losses: Any
) -> Objective:
    torch.manual_seed(5)
    return Objective(
        Losses.model_validate(ALL_TERMS | losses), uniform(), ModelPair(widths, causal)
    )


class Pair(nn.Module):
    """A tiny teacher, a student of it in fp64, and the objective between them."""

    def __init__(self, name: str, **losses: Any) -> None:
        super().__init__()
        self.teacher = tiny_model(name).requires_grad_(False)
        settings = Student(layers=2, hidden_size=NARROW)
        self.student = build_student(self.teacher, settings, uniform())[0]
        self.objective = make_objective(causal=try_model(self.teacher).causal, **losses)
        self.double()
        route_attention(self.student)

    def captured(self, inputs: Inputs) -> tuple[Capture, Capture]:
        def run(model: PreTrainedModel, side: Literal["student", "teacher"]) -> Capture:
            with capture(model, **self.objective.layers(side)) as states:
                model(**model_inputs(inputs), **capture_keywords(model))
            return states

        return run(self.student, "student"), run(self.teacher, "teacher")

    def forward(self, inputs: Inputs, shares: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = self.captured(inputs)
        total, values = self.objective(student, teacher, inputs, shares)
        return total, values[0]

    def gradients(self) -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        self.zero_grad()
        return found


def micro_batches(inputs: Inputs, sizes: tuple[int, ...]) -> list[Inputs]:
    parts = {name: tensor.split(sizes) for name, tensor in inputs.items()}
    return [
        {name: tensors[number] for name, tensors in parts.items()} for number in range(len(sizes))
    ]


@pytest.mark.parametrize(
    ("causal", "reduction", "masked", "expected"),
    [
        # lengths 3 and 1 of 3: 9 + 1 pairs, under the causal mask 6 + 1
        (False, "valid", True, [10, 4, 4]),
        (True, "valid", True, [7, 4, 4]),
        (False, "valid", False, [18, 6, 6]),
        (True, "valid", False, [12, 6, 6]),
        # as the official code: batch * tokens^2 and batch * tokens; rows are always valid ones
        (False, "tinybert", True, [18, 6, 4]),
        (True, "tinybert", True, [18, 6, 4]),
        (False, "tinybert", False, [18, 6, 6]),
    ],
)
def test_divisors_count_pairs_tokens_rows_and_examples(
    causal: bool, reduction: Reduction, masked: bool, expected: list[int]
) -> None:
    inputs = tiny_batch((3, 1))
    if not masked:
        del inputs["attention_mask"]
    divisors = count_divisors(inputs, causal, reduction)
    assert divisors.dtype == torch.float64
    # what a language model gives is compared at every row
    assert divisors.tolist() == [*expected, 2, 0, expected[2]]


def test_divisors_count_padding_on_the_left_as_well() -> None:
    inputs = {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 1, 1, 1]]),
    }
    assert count_divisors(inputs, True, "valid").tolist() == [6, 3, 3, 1, 0, 3]
    assert count_divisors(inputs, False, "valid").tolist() == [9, 3, 3, 1, 0, 3]


def test_labels_name_term_and_layers_in_the_order_of_the_losses() -> None:
    assert make_objective().labels == (
        "attention/1-2",
        "attention/2-4",
        "hidden/1-2",
        "hidden/2-4",
        "embedding/0-0",
    )


@pytest.mark.parametrize(
    ("off", "student", "teacher"),
    [
        (
            [],
            {"attention": {1, 2}, "hidden": {0, 1, 2}},
            {"attention": {2, 4}, "hidden": {0, 2, 4}},
        ),
        (
            ["hidden", "embedding"],
            {"attention": {1, 2}, "hidden": set()},
            {"attention": {2, 4}, "hidden": set()},
        ),
        (
            ["attention", "hidden"],
            {"attention": set(), "hidden": {0}},
            {"attention": set(), "hidden": {0}},
        ),
    ],
    ids=["all", "attention", "embedding"],
)
def test_only_the_layers_of_the_terms_are_captured(
    off: list[str], student: dict[str, set[int]], teacher: dict[str, set[int]]
) -> None:
    objective = make_objective(**dict.fromkeys(off))
    assert objective.layers("student") == {**student, **NOTHING}
    assert objective.layers("teacher") == {**teacher, **NOTHING}


def maps(state: Any) -> Tensor:
    """Scores before the softmax, with grouped keys repeated."""
    key = state.key.repeat_interleave(state.query.shape[1] // state.key.shape[1], dim=1)
    scores: Tensor = torch.einsum("bhqd,bhkd->bhqk", state.query, key) * state.scale
    return scores


def layers_of(match: LossInfo) -> tuple[int, int]:
    mine, theirs = match.layers.split("-")
    return int(mine), int(theirs)


def weights_of(objective: Objective) -> Tensor:
    terms = objective.losses.terms
    weights = [terms[match.term].weight for match in objective.matches]
    return torch.tensor(weights, dtype=torch.float64)


def defined(pair: Pair, reduction: Reduction) -> Tensor:
    """Every loss of a whole batch from its definition, with full maps."""
    student, teacher = pair.captured(BATCH)
    valid = BATCH["attention_mask"].bool()
    whole = torch.ones_like(valid)
    rows = valid if reduction == "valid" else whole
    tokens = valid.shape[1]
    entries = rows[:, None, :, None] & valid[:, None, None, :]
    if pair.objective.pair.causal:
        entries = entries & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    losses = []
    for match in pair.objective.matches:
        mine, theirs = layers_of(match)
        if match.term == "attention":
            own, target = student.attention[mine], teacher.attention[theirs]
            squares = (maps(own) - maps(target)).square() * entries
            count = entries.sum() * 4 if reduction == "valid" else squares.numel()
        else:
            term = pair.objective.terms[1]
            projected = student.hidden[mine] @ term.weight_0.mT + term.bias_0
            squares = (projected - teacher.hidden[theirs]).square() * rows[..., None]
            count = rows.sum() * WIDTH
        losses.append(squares.sum() / count)
    return torch.stack(losses)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2", "modernbert"])
def test_losses_and_gradients_equal_their_definition(name: str, reduction: Reduction) -> None:
    pair = Pair(name, reduction=reduction)
    expected = defined(pair, reduction)
    weights = weights_of(pair.objective)
    (weights * expected).sum().backward()
    gradients = pair.gradients()

    total, raw = pair(BATCH, WHOLE)
    total.backward()
    torch.testing.assert_close(raw, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total, (weights * raw).sum(), rtol=1e-9, atol=1e-12)
    found = pair.gradients()
    assert found.keys() == gradients.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[parameter], rtol=1e-7, atol=1e-10)


def test_logged_losses_carry_no_gradient() -> None:
    total, raw = Pair("bert")(BATCH, WHOLE)
    assert total.requires_grad
    assert total.shape == ()
    assert not raw.requires_grad


def test_a_weight_scales_its_own_term_only() -> None:
    raw = Pair("bert")(BATCH, WHOLE)[1]
    total, again = Pair("bert", attention={"weight": 0.0}, embedding={"weight": 0.5})(BATCH, WHOLE)
    assert torch.equal(raw, again)
    torch.testing.assert_close(total.detach(), 10 * (raw[2] + raw[3]) + 0.5 * raw[4])


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_step_is_the_same_however_it_is_cut(
    name: str, reduction: Reduction, sizes: tuple[int, ...]
) -> None:
    pair = Pair(name, reduction=reduction)
    divisors = pair.objective.divisors(BATCH)
    whole, raw = pair(BATCH, WHOLE)
    whole.backward()
    expected = pair.gradients()

    parts = micro_batches(BATCH, sizes)
    shares = [pair.objective.divisors(part) / divisors.clamp(min=1) for part in parts]
    # there are no labels
    torch.testing.assert_close(sum(shares)[:4], WHOLE[:4].double())
    total, losses = torch.zeros(()), torch.zeros(len(raw))
    for part, share in zip(parts, shares, strict=True):
        part_total, part_losses = pair(part, share)
        part_total.backward()
        total, losses = total + part_total.detach(), losses + part_losses
    torch.testing.assert_close(total.double(), whole.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(losses.double(), raw, rtol=1e-9, atol=1e-12)
    found = pair.gradients()
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_padding_changes_no_loss(name: str) -> None:
    pair = Pair(name)
    padded = {key: nn.functional.pad(tensor, (0, 5)) for key, tensor in BATCH.items()}
    assert torch.equal(pair.objective.divisors(padded), pair.objective.divisors(BATCH))
    torch.testing.assert_close(pair(padded, WHOLE)[1], pair(BATCH, WHOLE)[1], rtol=1e-6, atol=1e-9)


def test_no_mask_is_a_mask_of_ones() -> None:
    pair = Pair("bert")
    unmasked = {"input_ids": BATCH["input_ids"]}
    masked = {**unmasked, "attention_mask": torch.ones_like(BATCH["input_ids"])}
    expected = pair(masked, WHOLE)[1]
    torch.testing.assert_close(pair(unmasked, WHOLE)[1], expected, rtol=1e-9, atol=1e-12)


def state_term(objective: Objective) -> StateGroup:
    term = objective.terms[-1]
    assert isinstance(term, StateGroup)
    return term


@pytest.mark.parametrize(
    ("projection", "widths", "count"),
    [
        ("auto", (NARROW, WIDTH), 1),
        ("auto", (WIDTH, WIDTH), 0),
        ("none", (WIDTH, WIDTH), 0),
        ("shared", (NARROW, WIDTH), 1),
        ("shared", (WIDTH, WIDTH), 1),
        # two hidden pairs and the embeddings
        ("per_pair", (NARROW, WIDTH), 3),
        ("per_pair", (WIDTH, WIDTH), 3),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_projections_go_from_student_to_teacher_width(
    projection: str, widths: tuple[int, int], count: int, bias: bool
) -> None:
    objective = make_objective(widths=widths, projection=projection, projection_bias=bias)
    shapes = {name: tuple(p.shape) for name, p in state_term(objective).named_parameters()}
    student, teacher = widths
    expected: dict[str, tuple[int, ...]] = {f"weight_{i}": (teacher, student) for i in range(count)}
    if bias:
        expected |= {f"bias_{i}": (teacher,) for i in range(count)}
    assert shapes == expected


def test_a_shared_projection_serves_hidden_states_and_embeddings() -> None:
    pair = Pair("bert", hidden=None, attention=None)
    total, _ = pair(BATCH, WHOLE)
    total.backward()
    alone = pair.gradients()["objective.terms.0.weight_0"]
    both = Pair("bert", attention=None)
    both(BATCH, WHOLE)[0].backward()
    assert alone.abs().sum() > 0
    assert not torch.equal(both.gradients()["objective.terms.0.weight_0"], alone)


def test_each_pair_has_a_projection_of_its_own() -> None:
    pair = Pair("bert", attention=None, projection="per_pair")
    pair(BATCH, WHOLE)[0].backward()
    student, teacher = pair.captured(BATCH)
    valid = BATCH["attention_mask"].bool()
    term = state_term(pair.objective)
    for number, match in enumerate(pair.objective.matches):
        mine, theirs = layers_of(match)
        own, target = student.hidden[mine][valid], teacher.hidden[theirs][valid]
        weight, bias = (term.get_parameter(f"{kind}_{number}") for kind in ("weight", "bias"))
        difference = own @ weight.mT + bias - target
        factor = pair.objective.losses.terms[match.term].weight
        expected = 2 * factor * difference.mT @ own / difference.numel()
        torch.testing.assert_close(weight.grad, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("projection", ["auto", "none"])
def test_equal_widths_are_compared_as_they_are(projection: str) -> None:
    objective = make_objective(widths=(WIDTH, WIDTH), projection=projection, attention=None)
    states = Capture(hidden={layer: torch.randn(2, 5, WIDTH) for layer in range(LAYERS + 1)})
    same = Capture(hidden={0: states.hidden[0], 1: states.hidden[2], 2: states.hidden[4]})
    _, values = objective(same, states, {"input_ids": torch.ones(2, 5)}, WHOLE)
    assert values[0].tolist() == [0.0, 0.0, 0.0]


def test_attention_alone_has_no_parameters() -> None:
    objective = make_objective(hidden=None, embedding=None)
    assert not list(objective.parameters())
    assert len(objective.terms) == 1


def test_no_projection_between_different_widths_is_refused() -> None:
    expected = (
        f"losses.projection is none, but the student is {NARROW} wide and the teacher {WIDTH}"
    )
    with pytest.raises(UserError, match=f"{expected}; set it to shared or per_pair"):
        make_objective(projection="none")
    # nothing is projected for attention
    make_objective(projection="none", hidden=None, embedding=None)
