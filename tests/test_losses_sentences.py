"""Losses on pooled sentence embeddings against plain loops in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_losses_matches import objective, parameters
from test_recipe import refusal, tree
from tiny_models import tiny_batch, tiny_model
from torch import Tensor

from fastkd.capture import Capture, capture, capture_keywords
from fastkd.errors import UserError
from fastkd.losses import DIVISORS
from fastkd.losses.objective import Objective
from fastkd.losses.pooling import PoolingMode, pool_tokens
from fastkd.losses.rkd import angles

LENGTHS = (5, 2, 4, 3, 1)
NARROW, WIDE = 6, 8
WHOLE = torch.ones(len(DIVISORS)).double()
SECTIONS: list[dict[str, Any]] = [
    {"loss": "embedding_output", "pooling": pooling} for pooling in ("mean", "cls", "last")
]
SECTIONS += [{"loss": "rkd", "kind": kind} for kind in ("distance", "angle")]


def inputs(left: bool = False) -> dict[str, Tensor]:
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return {
        "input_ids": torch.ones(5, 5, dtype=torch.long),
        "attention_mask": (mask.flip(1) if left else mask).long(),
    }


def outputs(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 5, width, generator=generator, dtype=torch.float64)


def embedded(states: Tensor, given: dict[str, Tensor], pooling: str) -> list[Tensor]:
    found = []
    for state, mask in zip(states, given["attention_mask"].bool(), strict=True):
        valid = state[mask]
        found.append({"mean": valid.mean(0), "cls": valid[0], "last": valid[-1]}[pooling])
    return found


def huber(values: list[Tensor]) -> Tensor:
    terms = [v**2 / 2 if abs(v) <= 1 else abs(v) - 0.5 for v in values]
    return torch.stack(terms).mean()


def related(points: list[Tensor], kind: str) -> list[Tensor]:
    number = range(len(points))
    if kind == "distance":
        apart = [(points[i] - points[j]).norm() for i in number for j in number if i != j]
        return [a / (sum(apart) / len(apart)) for a in apart]
    found = []
    for i in number:
        for j in number:
            for k in number:
                if len({i, j, k}) == 3:
                    one, other = points[i] - points[j], points[k] - points[j]
                    found.append(one @ other / (one.norm() * other.norm()))
    return found


def defined(
    section: dict[str, Any], student: Tensor, teacher: Tensor, given: dict[str, Tensor]
) -> Tensor:
    pooling = section.get("pooling", "mean")
    points, targets = (embedded(states, given, pooling) for states in (student, teacher))
    if section["loss"] == "embedding_output":
        pairs = zip(points, targets, strict=True)
        return torch.stack([1 - a @ b / (a.norm() * b.norm()) for a, b in pairs]).mean()
    pairs = zip(*(related(p, section["kind"]) for p in (points, targets)), strict=True)
    return huber([a - b for a, b in pairs])


def run(made: Objective, student: Tensor, teacher: Tensor, given: dict[str, Tensor]) -> Tensor:
    seen = Capture(outputs=student), Capture(outputs=teacher)
    return made(*seen, given, WHOLE)[0]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_losses_and_gradients_are_those_of_the_definition(
    section: dict[str, Any], left: bool
) -> None:
    given = inputs(left)
    student, teacher = outputs(WIDE, 1).requires_grad_(), outputs(WIDE, 2)
    total = run(objective({"mine": section}, (WIDE, WIDE)), student, teacher, given)
    expected = defined(section, student, teacher, given)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
    (found,) = torch.autograd.grad(total, student)
    (gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-12)
    assert not found[~given["attention_mask"].bool()].any()


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_models_of_different_widths_are_compared(section: dict[str, Any]) -> None:
    made = objective({"mine": section})
    student, teacher = outputs(NARROW, 1), outputs(WIDE, 2)
    total = run(made, student, teacher, inputs())
    if section["loss"] == "embedding_output":
        assert parameters(made) == {"terms.0.projection.weight": (WIDE, NARROW)}
        weight = made.get_parameter("terms.0.projection.weight")
        # a linear layer commutes with the pooling
        student = student @ weight.mT
    else:
        assert not parameters(made)
    torch.testing.assert_close(total, defined(section, student, teacher, inputs()))


def test_a_step_of_sentences_is_the_same_however_it_is_cut() -> None:
    made = objective({"embedding_output": {}}, (WIDE, WIDE))
    student, teacher, given = outputs(WIDE, 1), outputs(WIDE, 2), inputs()
    divisors = made.divisors(given).clamp(min=1)
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 5)):
        cut = {name: tensor[part] for name, tensor in given.items()}
        seen = Capture(outputs=student[part]), Capture(outputs=teacher[part])
        total = total + made(*seen, cut, made.divisors(cut) / divisors)[0]
    torch.testing.assert_close(total, run(made, student, teacher, given))


def test_relations_of_batches_of_their_own_are_the_mean_of_means_by_examples() -> None:
    section = {"loss": "rkd"}
    made = objective({"rkd": section}, (WIDE, WIDE))
    student, teacher, given = outputs(WIDE, 1), outputs(WIDE, 2), inputs()
    divisors = made.divisors(given).clamp(min=1)
    total, expected = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for part, examples in ((slice(0, 2), 2), (slice(2, 5), 3)):
        cut = {name: tensor[part] for name, tensor in given.items()}
        seen = Capture(outputs=student[part]), Capture(outputs=teacher[part])
        total = total + made(*seen, cut, made.divisors(cut) / divisors)[0]
        kind = {**section, "kind": "distance"}
        expected = expected + examples / 5 * defined(kind, student[part], teacher[part], cut)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(("kind", "most"), [("distance", 1), ("angle", 2)])
def test_too_few_sentences_have_no_relations(kind: str, most: int) -> None:
    made = objective({"rkd": {"kind": kind}}, (WIDE, WIDE))
    student = outputs(WIDE, 1)[:most].requires_grad_()
    given = {name: tensor[:most] for name, tensor in inputs().items()}
    total = run(made, student, outputs(WIDE, 2)[:most], given)
    assert total.item() == 0
    total.backward()
    assert student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("kind", ["distance", "angle"])
def test_sentences_that_coincide_have_finite_gradients(kind: str) -> None:
    made = objective({"rkd": {"kind": kind}}, (WIDE, WIDE))
    student = torch.ones(5, 5, WIDE, dtype=torch.float64, requires_grad=True)
    total = run(made, student, outputs(WIDE, 2), inputs())
    total.backward()
    assert total.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["distance", "angle"])
def test_two_sentences_that_coincide_do_not_drown_the_others(kind: str) -> None:
    """As of one text that the teacher reads as two: the student has no direction between them."""
    made = objective({"rkd": {"kind": kind}}, (WIDE, WIDE))
    states = outputs(WIDE, 1)[:, :1].repeat(1, 5, 1)
    near = states.clone()
    states[3], near[3] = states[1], states[1] + 1e-6
    found = []
    for given in (states, near):
        given.requires_grad_()
        run(made, given, outputs(WIDE, 2), inputs()).backward()
        assert given.grad is not None
        found.append(given.grad.norm(dim=(1, 2)))
    assert found[0].max() < 1
    # those that have nothing to do with the two learn as they would beside any other
    torch.testing.assert_close(found[0][[0, 2, 4]], found[1][[0, 2, 4]], rtol=0.5, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_of_a_point_with_itself_leave_no_rounding_in_gradients(dtype: torch.dtype) -> None:
    points = outputs(WIDE, 1)[:, 0].to(dtype).requires_grad_()
    weights = torch.linspace(-1, 1, 125, dtype=torch.float64).view(5, 5, 5)
    (found,) = torch.autograd.grad((angles(points) * weights.to(dtype)).sum(), points)
    exact = points.detach().double().requires_grad_()
    number = range(5)
    terms = []
    for j in number:
        for i in number:
            for k in number:
                if len({i, j, k}) == 3:
                    one, other = exact[i] - exact[j], exact[k] - exact[j]
                    terms.append(weights[j, i, k] * (one @ other) / (one.norm() * other.norm()))
    (expected,) = torch.autograd.grad(torch.stack(terms).sum(), exact)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


def test_pooling_takes_all_tokens_where_nothing_is_padded() -> None:
    states = outputs(WIDE, 1)
    for pooling, expected in (
        ("mean", states.mean(1)),
        ("cls", states[:, 0]),
        ("last", states[:, -1]),
    ):
        torch.testing.assert_close(pool_tokens(states, None, pooling), expected)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_models_own_poolings_leave_padding_out(left: bool) -> None:
    mask = inputs(left)["attention_mask"].bool()
    # so that a padding token would be the largest
    states = outputs(WIDE, 1).masked_fill(~mask.unsqueeze(-1), 9.0)
    rows = [state[kept] for state, kept in zip(states, mask, strict=True)]
    places = [torch.arange(1, len(row) + 1, dtype=torch.float64) for row in rows]
    expected: dict[PoolingMode, list[Tensor]] = {
        "max": [row.amax(0) for row in rows],
        "weighted_mean": [n @ row / n.sum() for n, row in zip(places, rows, strict=True)],
        "mean_sqrt_len": [row.sum(0) / len(row) ** 0.5 for row in rows],
    }
    for pooling, vectors in expected.items():
        torch.testing.assert_close(pool_tokens(states, mask, pooling), torch.stack(vectors))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", ["mse", "cosine", "normalized_mse"])
@pytest.mark.parametrize("tokens", ["mean", "cls"])
def test_hidden_states_are_compared_by_one_vector_of_each_text(
    tokens: str, kind: str, left: bool
) -> None:
    losses: dict[str, dict[str, Any]]
    losses = {"hidden": {"tokens": tokens, "kind": kind, "layer_map": [2, 4]}}
    student, teacher, given = outputs(WIDE, 1), outputs(WIDE, 2), inputs(left)
    seen = [Capture(hidden=dict.fromkeys(range(5), states)) for states in (student, teacher)]
    found = objective(losses, (WIDE, WIDE))(*seen, given, WHOLE)[1][0]
    points, targets = (torch.stack(embedded(x, given, tokens)) for x in (student, teacher))
    cosine = 1 - torch.cosine_similarity(points, targets, dim=-1)
    square = (points - targets).square().mean()
    # |u - v|^2 of unit vectors is 2 - 2 cos
    expected = {"mse": square, "cosine": cosine.mean(), "normalized_mse": 2 * cosine.mean()}
    torch.testing.assert_close(found, expected[kind].expand(2))
    if kind == "normalized_mse":
        # two layers, of the teacher's width
        losses["hidden"]["average"] = True
        found = objective(losses, (WIDE, WIDE))(*seen, given, WHOLE)[1][0]
        torch.testing.assert_close(found, (2 * cosine.mean() / (2 * WIDE)).expand(2))


@pytest.mark.parametrize("name", ["bert", "qwen2", "modernbert"])
def test_outputs_are_the_states_after_the_final_norm(name: str) -> None:
    model, batch = tiny_model(name), tiny_batch((6, 4))
    with torch.no_grad(), capture(model, outputs=True) as seen:
        expected = model(**batch, **capture_keywords(model)).last_hidden_state
    assert seen.outputs is not None
    assert torch.equal(seen.outputs, expected)
    assert not model._forward_hooks


def test_a_teacher_whose_outputs_are_read_runs_whole() -> None:
    assert objective({"embedding_output": {}}).teacher_depth is None
    assert objective({"embedding_output": {}}).layers("teacher")["outputs"]


def test_different_widths_need_a_projection() -> None:
    with pytest.raises(UserError, match=r"losses.mine.projection is none, but the student's p"):
        objective({"mine": {"loss": "embedding_output", "projection": "none"}})
    assert refusal(tree(losses={"rkd": {"kind": "angles"}})).startswith("losses.rkd.kind: input")
