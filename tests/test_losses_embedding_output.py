"""Embeddings against the teacher's, in plain fp64: by the modules of its folder, projected, cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_recipe import refusal, tree
from torch import Tensor, nn

from fastkd.capture import Capture
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.losses import DIVISORS, ModelPair
from fastkd.losses.objective import Objective
from fastkd.losses.pooling import Dense, EmbeddingModules, LayerNorm, Normalize
from fastkd.losses.sequence_embeddings import SequenceEmbeddingGroup
from fastkd.recipe import Losses

NARROW, WIDE, DIM, BATCH, TOKENS = 5, 8, 6, 4, 5
LENGTHS = (5, 2, 4, 1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


NORM = drawn(2 * WIDE, seed=3), drawn(2 * WIDE, seed=4)
LINEAR = drawn(DIM, 2 * WIDE, seed=5), drawn(DIM, seed=6)
CHAIN = EmbeddingModules(
    WIDE,
    ("mean", "last"),
    [LayerNorm(*NORM), Dense(*LINEAR, activation=nn.Tanh()), Normalize()],
)


def pair(student: int = NARROW, teacher: EmbeddingModules = CHAIN) -> ModelPair:
    return ModelPair((student, teacher.width), embeddings=(teacher.of_student(student), teacher))


def objective(losses: dict[str, Any], models: ModelPair) -> Objective:
    torch.manual_seed(4)
    layers = make_layer_map("uniform", 2, 4)
    return Objective(Losses.model_validate(losses), layers, models).double()


def inputs() -> dict[str, Tensor]:
    mask = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    ids = torch.ones(BATCH, TOKENS, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask.long()}


def run(made: Objective, student: Tensor, teacher: Tensor, rows: slice = slice(None)) -> Tensor:
    given = {name: value[rows] for name, value in inputs().items()}
    shares = made.divisors(given) / made.divisors(inputs())
    seen = Capture(outputs=student[rows]), Capture(outputs=teacher[rows])
    return made(*seen, given, shares)[0]


def defined(state: Tensor, length: int, projection: Tensor | None) -> Tensor:
    """One sequence's embedding by `CHAIN`."""
    vector = torch.cat([state[:length].mean(0), state[length - 1]])
    if projection is not None:
        vector = projection @ vector
    centred = vector - vector.mean()
    vector = centred / (centred.square().mean() + 1e-5).sqrt() * NORM[0] + NORM[1]
    vector = (LINEAR[0] @ vector + LINEAR[1]).tanh()
    return vector / vector.norm()


def compared(one: Tensor, other: Tensor, kind: str) -> Tensor:
    one, other = one / one.norm(), other / other.norm()
    return 1 - one @ other if kind == "cosine" else (one - other).square().mean()


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("dimensions", [[], [2, 5], [6]], ids=str)
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_loss_and_gradients_are_those_of_the_definition(
    width: int, dimensions: list[int], kind: str
) -> None:
    section = {"kind": kind, "dimensions": dimensions}
    made = objective({"embedding_output": section}, pair(width))
    student = drawn(BATCH, TOKENS, width, seed=1).requires_grad_()
    teacher = drawn(BATCH, TOKENS, WIDE, seed=2).requires_grad_()
    total = run(made, student, teacher)
    weights = dict(made.named_parameters())
    assert set(weights) == ({"terms.0.projection.weight"} if width != WIDE else set())
    projection = next(iter(weights.values()), None)
    each = []
    for row, length in enumerate(LENGTHS):
        own = defined(student[row], length, projection)
        target = defined(teacher[row].detach(), length, None)
        for size in sorted({*dimensions, DIM}):
            each.append(compared(own[:size], target[:size], kind))
    expected = torch.stack(each).mean()
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
    learnt = [student, *weights.values()]
    found = torch.autograd.grad(total, learnt, retain_graph=True)
    for gradient, value in zip(found, torch.autograd.grad(expected, learnt), strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-8, atol=1e-12)
    assert torch.autograd.grad(total, teacher, allow_unused=True) == (None,)


def test_a_step_is_the_same_however_it_is_cut() -> None:
    made = objective({"embedding_output": {"dimensions": [3], "kind": "mse"}}, pair())
    student, teacher = drawn(BATCH, TOKENS, NARROW, seed=1), drawn(BATCH, TOKENS, WIDE, seed=2)
    parts = [run(made, student, teacher, rows) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), run(made, student, teacher))


def test_what_is_handed_on_is_what_was_compared() -> None:
    made = objective({"embedding_output": {}}, pair())
    with torch.no_grad():
        made.get_parameter("terms.0.projection.weight").mul_(3)
    modules, states = made.embedding("student"), drawn(BATCH, TOKENS, NARROW, seed=1)
    assert modules is not None and modules.dim == DIM
    found = modules(states, inputs()["attention_mask"].bool())
    weight = made.get_parameter("terms.0.projection.weight").detach()
    expected = [defined(s, n, weight) for s, n in zip(states, LENGTHS, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    # a copy: what trains on doesn't move it
    assert not list(modules.parameters()) and made.kept().keys() == {"terms.0.projection.weight"}
    assert made.embedding("teacher") is CHAIN


def test_a_pooling_of_the_recipe_takes_the_place_of_both_models_own() -> None:
    teacher = EmbeddingModules(WIDE, ("mean",), [Normalize()])
    made = objective({"embedding_output": {"pooling": "cls"}}, pair(WIDE, teacher))
    student, states = drawn(BATCH, TOKENS, WIDE, seed=1), drawn(BATCH, TOKENS, WIDE, seed=2)
    pairs = zip(student[:, 0], states[:, 0], strict=True)
    expected = torch.stack([compared(*each, "cosine") for each in pairs]).mean()
    torch.testing.assert_close(run(made, student, states), expected)
    modules = made.embedding("student")
    assert modules is not None and modules.pooling == ("cls",)


def test_a_projection_of_its_own_has_the_rate_of_projections() -> None:
    losses = {"embedding_output": {"projection": "own"}, "projection_learning_rate": 0.1}
    made = objective(losses, pair(WIDE))
    assert made.parameter_rates() == {"terms.0.projection.weight": 0.1}
    assert made.get_parameter("terms.0.projection.weight").shape == (2 * WIDE, 2 * WIDE)


def own(name: str = "embedding_output", **section: Any) -> dict[str, Any]:
    return {name: {"loss": "embedding_output", **section}}


REFUSED = {
    "no projection": (own(projection="none"), "pooled states have 10 numbers and the teacher's 16"),
    "two poolings": (
        own("a", pooling="cls") | own("b"),
        "differs (losses.a: cls, losses.b: their own), but a model has one embedding",
    ),
    "a pooling that fits nothing": (
        own("a", pooling="cls"),
        "losses.a.pooling is cls: LayerNorm is for vectors of 16, but is given 8; leave it out",
    ),
    "long prefixes": (
        own("a", dimensions=[7]),
        "losses.a.dimensions has 7, but the student's embedding has 6 numbers and the teacher's 6",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_compared_is_refused(name: str) -> None:
    losses, expected = REFUSED[name]
    with pytest.raises(UserError) as error:
        objective(losses, pair())
    assert expected in str(error.value)


def test_one_student_is_not_both_projected_and_bare() -> None:
    losses = own("a", projection="none") | own("b", projection="own")
    with pytest.raises(UserError, match=r"losses.a.projection is none and losses.b.projection is"):
        objective(losses, pair(WIDE))


def test_dimensions_are_above_zero() -> None:
    assert refusal(tree(losses=own(dimensions=[0]))).startswith("losses.embedding_output.dim")


def test_divisors_are_examples() -> None:
    made = objective({"embedding_output": {}}, pair())
    assert [match.divisor for match in made.matches] == ["examples"]
    assert made.divisors(inputs())[DIVISORS.index("examples")] == BATCH
    assert made.teacher_depth is None


def hidden(width: int = NARROW, **changes: Any) -> ModelPair:
    teacher = EmbeddingModules(WIDE, ("mean",), [Normalize()])
    return replace(pair(width, teacher), **{"last_is_output": True, **changes})


def test_a_hidden_loss_of_the_last_layers_says_what_the_embedding_is() -> None:
    for losses in ({"hidden": {}}, {"hidden": {"projection": "per_pair"}}):
        made = objective(losses, hidden())
        modules = made.student_modules()
        assert modules is not None and modules.projection is not None
        number = len(made.kept()) // 2 - 1
        weight, bias = (made.kept()[f"terms.0.{kind}_{number}"] for kind in ("weight", "bias"))
        states = drawn(BATCH, TOKENS, NARROW, seed=1)
        expected = (states @ weight.mT + bias).mean(1)
        found = modules(states)
        torch.testing.assert_close(found, expected / expected.norm(dim=-1, keepdim=True))
        assert "from losses.hidden, Normalize" in modules.describe()
    # what is compared wins
    made = objective({"hidden": {}, "embedding_output": {}}, hidden())
    modules = made.student_modules()
    assert modules is not None and "from losses.embedding_output" in modules.describe()


NOT_OF_THE_EMBEDDING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a norm behind the last block": ({}, {"last_is_output": False}),
    "modules that are not known": ({}, {"embeddings": None}),
    "several poolings": ({}, {"embeddings": (CHAIN.of_student(NARROW), CHAIN)}),
    "another kind": ({"kind": "cosine"}, {}),
    "another layer": ({"layer_map": [0, 3]}, {}),
    "layers that are drawn": ({"layer_map": "random"}, {}),
    "several layers": ({"layer_map": "mean_target"}, {}),
    "all layers": ({"layer_map": "emd"}, {}),
    "no weight": ({"weight": 0}, {}),
}


@pytest.mark.parametrize("name", NOT_OF_THE_EMBEDDING)
def test_a_projection_that_is_none_of_the_embedding_stays(name: str) -> None:
    section, changes = NOT_OF_THE_EMBEDDING[name]
    # something must be learned
    beside = {"embedding": {}} if section.get("weight") == 0 else {}
    losses = Losses.model_validate({"hidden": section, **beside})
    given = getattr(losses.terms["hidden"], "layer_map", None) or "uniform"
    made = Objective(losses, make_layer_map(given, 2, 4), hidden(**changes))
    assert made.kept() and made.student_modules() is None


def test_a_projection_begins_as_that_of_the_model_that_a_student_starts_from() -> None:
    for start, kept in (
        (EmbeddingModules(NARROW, ("mean", "last"), [Dense(drawn(16, 10))]), True),
        (EmbeddingModules(NARROW, ("mean", "cls"), [Dense(drawn(16, 10))]), False),
        (EmbeddingModules(NARROW, ("mean", "last"), [Dense(drawn(6, 10))]), False),
        (
            EmbeddingModules(NARROW, ("mean", "last"), [Dense(drawn(16, 10), None, nn.Tanh())]),
            False,
        ),
        (EmbeddingModules(NARROW, ("mean", "last"), [Normalize()]), False),
    ):
        made = objective({"embedding_output": {}}, pair())
        (group,) = made.each()
        assert isinstance(group, SequenceEmbeddingGroup)
        group.begin_from(start)
        weight = made.get_parameter("terms.0.projection.weight")
        assert torch.equal(weight, drawn(16, 10)) == kept
        modules = group.student_modules()
        assert ("begun as that of student.init" in modules.describe()) == kept


def test_lengths_count_where_they_are_asked_for() -> None:
    made = objective({"embedding_output": {"kind": "vector_mse"}}, pair())
    group = made.terms[0]
    assert isinstance(group, SequenceEmbeddingGroup)
    (loss,) = group.losses
    one, other = drawn(3, DIM, 1, seed=1)[..., 0], drawn(3, DIM, 1, seed=2)[..., 0]
    found = loss.compare(one, 2 * other, None)  # type: ignore[arg-type]
    assert found == pytest.approx(float(((one - 2 * other) ** 2).mean()))
    assert "kind is vector_mse, but dimensions names" in refusal(
        tree(losses=own(kind="vector_mse", dimensions=[2]))
    )


def test_a_student_keeps_the_pooling_that_it_starts_with() -> None:
    """Where it starts from a model of its own, and no loss says another one."""
    own, mean = EmbeddingModules(WIDE, ("cls",)), EmbeddingModules(WIDE)
    models = ModelPair((WIDE, WIDE), embeddings=(own, mean))
    state, target = drawn(BATCH, TOKENS, WIDE, seed=1), drawn(BATCH, TOKENS, WIDE, seed=2)
    pairs = zip(state, target, LENGTHS, strict=True)
    firsts = [compared(one[0], other[:n].mean(0), "cosine") for one, other, n in pairs]
    made = objective({"embedding_output": {}}, models)
    torch.testing.assert_close(run(made, state, target), torch.stack(firsts).mean())
    found = {}
    for name, losses in {
        "as it was": {"embedding_output": {}},
        "as told": {"embedding_output": {"pooling": "last"}},
        "of no loss": {"attention": {}},
    }.items():
        modules = objective(losses, models).embedding("student")
        assert modules is not None
        found[name] = modules.pooling
    assert found == {"as it was": ("cls",), "as told": ("last",), "of no loss": ("cls",)}
