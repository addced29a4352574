"""Losses of all rows of a step against plain loops in fp64, whole and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_losses_sentences import huber, related
from torch import Tensor

from fastkd.capture import Capture
from fastkd.data.batching import BatchPlan
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.losses import Batch, Captures, Loss, ModelPair, register_loss, registry
from fastkd.losses.gathering import Gather
from fastkd.losses.objective import Objective
from fastkd.recipe import Losses
from fastkd.training.gathering import check_gathering, step_gathers

ROWS, TOKENS, NARROW, WIDE = 6, 4, 6, 8
GROUP, PAIR = ("query", "positive", "negative"), ("query", "positive")
CUTS = (2, 1, 3)
KL = {"kind": "kl", "temperature": 0.5}
SECTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"loss": "rkd"}, ("text",)),
    ({"loss": "rkd", "kind": "angle"}, ("text",)),
    ({"loss": "similarity"}, GROUP),
    ({"loss": "similarity", "dimensions": [2, 5]}, ("text",)),
    ({"loss": "similarity", **KL}, GROUP),
    ({"loss": "similarity", "between": "query_document"}, GROUP),
    ({"loss": "similarity", "between": "query_document", **KL, "dimensions": [3]}, PAIR),
    ({"loss": "contrastive", "temperature": 0.5}, GROUP),
    ({"loss": "contrastive", "temperature": 0.5, "symmetric": True}, PAIR),
    ({"loss": "contrastive", "symmetric": True, "dimensions": [2]}, GROUP),
    ({"loss": "contrastive", "temperature": 0.3, "distilled": True, "symmetric": True}, GROUP),
    ({"loss": "score"}, PAIR),
    ({"loss": "score", "similarity": "dot", "scale": 2.0}, GROUP),
    ({"loss": "score", "scale": 2.0, "dimensions": [4, 5]}, GROUP),
    ({"loss": "score", "kind": "margin_mse", "scale": 3.0}, GROUP),
    ({"loss": "score", "kind": "listwise_kl", "temperature": 0.5}, GROUP),
    ({"loss": "score", "kind": "listwise_kl", "target": "file", "scale": 5.0}, GROUP),
]
Vectors = Sequence[Tensor]


def made(section: dict[str, Any], row: tuple[str, ...], **pair: Any) -> Objective:
    losses = Losses.model_validate({"mine": section})
    given: dict[str, Any] = {"widths": (NARROW, WIDE), **pair}
    return Objective(losses, make_layer_map("uniform", 2, 4), ModelPair(row=row, **given)).double()


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs(texts: int) -> dict[str, Tensor]:
    lengths = torch.arange(ROWS * texts) % TOKENS + 1
    # so few that some texts are equal, behind whose ends other things stand
    ids = (drawn(ROWS * texts, TOKENS, seed=7) > 0).long()
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(TOKENS) < lengths[:, None]).long(),
        "scores": drawn(ROWS, texts - 1, seed=3).float(),
    }


def total(
    objective: Objective,
    student: Tensor,
    teacher: Tensor,
    given: dict[str, Tensor],
    texts: int,
    cuts: Sequence[int] = (ROWS,),
) -> Tensor:
    """The loss of a step of so many rows a micro-batch, as the loop adds it up."""
    whole = objective.divisors(given).clamp(min=1)

    def losses(gathers: Sequence[Gather]) -> list[Tensor]:
        found, first = [], 0
        for rows, gather in zip(cuts, gathers, strict=True):
            part = slice(first * texts, (first + rows) * texts)
            cut = {name: tensor[part] for name, tensor in given.items()}
            cut["scores"] = given["scores"][first : first + rows]
            seen = Capture(outputs=student[part]), Capture(outputs=teacher[part])
            found.append(objective(*seen, cut, objective.divisors(cut) / whole, gather)[0])
            first += rows
        return found

    alone = Ranks(0, 1, torch.device("cpu"))
    return torch.stack(losses(step_gathers(alone, len(cuts), losses))).sum()


def embedded(states: Tensor, mask: Tensor) -> list[Tensor]:
    return [state[valid.bool()].mean(0) for state, valid in zip(states, mask, strict=True)]


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return one @ other / (one.norm() * other.norm())


def kl(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """KL(teacher | student) of one softmax."""
    p, q = (torch.stack(list(logits)).softmax(0) for logits in (teacher, student))
    return (p * (p / q).log()).sum()


def pairs_of(section: dict[str, Any], texts: int) -> list[list[tuple[int, int]]]:
    """Of `losses.similarity`: which sequences each one is compared with."""
    count = ROWS * texts
    if section.get("between") == "query_document":
        documents = [j for j in range(count) if j % texts]
        return [[(i, j) for j in documents] for i in range(0, count, texts)]
    return [[(i, j) for j in range(count) if j != i] for i in range(count)]


def similarity(section: dict[str, Any], s: Vectors, t: Vectors, texts: int) -> Tensor:
    temperature, values = section.get("temperature", 1), []
    for pairs in pairs_of(section, texts):
        found, expected = ([cosine(v[i], v[j]) / temperature for i, j in pairs] for v in (s, t))
        if section.get("kind") == "kl":
            values.append(kl(found, expected))
        else:
            values += [(a - b) ** 2 for a, b in zip(found, expected, strict=True)]
    return torch.stack(values).mean()


def also_right(ids: Sequence[list[int]], texts: int, query: int, choice: int) -> bool:
    """Whether a choice is right for a row of this query, and not the row's own."""
    if choice % texts > 1:
        return ids[choice] == ids[query + 1]
    other = choice - choice % texts
    same = ids[other] == ids[query] or ids[other + 1] == ids[query + 1]
    return other != query and same


def contrastive(
    section: dict[str, Any], s: Vectors, t: Vectors, texts: int, ids: Sequence[list[int]]
) -> Tensor:
    temperature = section.get("temperature", 0.05)
    queries = list(range(0, ROWS * texts, texts))
    documents = [j for j in range(ROWS * texts) if j % texts]
    # what chooses, what it chooses among, and which of these is its own
    choices = [(i, documents, documents.index(i + 1)) for i in queries]
    if section.get("symmetric"):
        choices += [(i + 1, queries, queries.index(i)) for i in queries]
    values = []
    for one, among, own in choices:
        if not section.get("distilled"):
            query = one - one % texts
            right = [j for j in among if also_right(ids, texts, query, j)]
            kept = among[own]
            among = [j for j in among if j not in right]
            own = among.index(kept)
        found, expected = ([cosine(v[one], v[j]) / temperature for j in among] for v in (s, t))
        chosen = -torch.stack(found).log_softmax(0)[own]
        values.append(kl(found, expected) if section.get("distilled") else chosen)
    return torch.stack(values).mean()


def score(
    section: dict[str, Any], s: Vectors, t: Vectors, texts: int, scores: Tensor | None
) -> Tensor:
    scale = section.get("scale", 1)
    of = (lambda a, b: a @ b) if section.get("similarity") == "dot" else cosine

    def rows(vectors: Vectors) -> list[list[Tensor]]:
        firsts = range(0, ROWS * texts, texts)
        return [[scale * of(vectors[i], vectors[i + k]) for k in range(1, texts)] for i in firsts]

    expected = rows(t) if scores is None else [list(row) for row in scores.double()]
    return compared(section, rows(s), expected)


def compared(
    section: dict[str, Any], found: list[list[Tensor]], expected: list[list[Tensor]]
) -> Tensor:
    """The loss of scores by row and candidate."""
    kind, temperature = section.get("kind", "mse"), section.get("temperature", 1)
    values = []
    for a, b in zip(found, expected, strict=True):
        if kind == "listwise_kl":
            values.append(kl([x / temperature for x in a], [x / temperature for x in b]))
        elif kind == "margin_mse":
            values += [((a[0] - x) - (b[0] - y)) ** 2 for x, y in zip(a[1:], b[1:], strict=True)]
        else:
            values += [(x - y) ** 2 for x, y in zip(a, b, strict=True)]
    return torch.stack(values).mean()


def defined(
    section: dict[str, Any], student: Tensor, teacher: Tensor, given: dict[str, Tensor], texts: int
) -> Tensor:
    s, t = (embedded(states, given["attention_mask"]) for states in (student, teacher))
    if section["loss"] == "rkd":
        found = zip(*(related(v, section.get("kind", "distance")) for v in (s, t)), strict=True)
        return huber([a - b for a, b in found])
    formulas: dict[str, Callable[..., Tensor]] = {
        "similarity": similarity,
        "contrastive": contrastive,
        "score": score,
    }
    masked = zip(given["input_ids"], given["attention_mask"].bool(), strict=True)
    more = {
        "score": [given["scores"] if section.get("target") == "file" else None],
        "contrastive": [[ids[valid].tolist() for ids, valid in masked]],
    }.get(section["loss"], [])
    whole = formulas[section["loss"]](section, s, t, texts, *more)
    cut = []
    for size in section.get("dimensions", ()):
        cut.append(formulas[section["loss"]](section, [v[:size] for v in s], t, texts, *more))
    return torch.stack([whole, *cut]).mean()


@pytest.mark.parametrize("cuts", [(ROWS,), CUTS], ids=["whole", "cut"])
@pytest.mark.parametrize(("section", "row"), SECTIONS, ids=lambda given: str(given))
def test_a_step_is_the_definition_on_all_of_its_rows(
    section: dict[str, Any], row: tuple[str, ...], cuts: Sequence[int]
) -> None:
    texts = len(row)
    given = inputs(texts)
    student = drawn(ROWS * texts, TOKENS, NARROW, seed=1).requires_grad_()
    teacher = drawn(ROWS * texts, TOKENS, WIDE, seed=2)
    found = total(made(section, row), student, teacher, given, texts, cuts)
    expected = defined(section, student, teacher, given, texts)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(found, student)
    (right,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, right, rtol=1e-8, atol=1e-12)
    assert gradient.any() and not gradient[given["attention_mask"] == 0].any()


def test_texts_are_told_apart_by_their_tokens_alone() -> None:
    ids = torch.tensor([[5, 6, 0], [0, 5, 6], [5, 6, 9], [6, 5, 0], [5, 0, 0], [5, 6, 0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    found = Batch(mask=mask.bool(), ids=ids).texts.tolist()
    assert found[0] == found[1] == found[2] and len(set(found)) == 4
    whole = Batch(ids=ids).texts
    assert whole[0] == found[5] and len(whole.unique()) == 5
    # of a whole vocabulary none meet
    assert len(Batch(ids=torch.arange(100_000)[:, None]).texts.unique()) == 100_000


@pytest.mark.parametrize("target", ["teacher", "file"])
@pytest.mark.parametrize("kind", ["mse", "margin_mse", "listwise_kl"])
def test_scores_of_rerankers_are_what_their_heads_give(kind: str, target: str) -> None:
    section = {"loss": "score", "kind": kind, "target": target}
    row = ("positive", "passages[0]", "passages[1]")
    objective = made(section, row, head="sequence_classification", outputs=1)
    assert not objective.layers("student")["outputs"] and objective.layers("teacher")["logits"]
    student = drawn(ROWS * 3, 1, seed=1).requires_grad_()
    teacher, scores = drawn(ROWS * 3, 1, seed=2), drawn(ROWS, 3, seed=3).float()
    parts, expected = (
        [],
        compared(
            section,
            [list(one) for one in student.view(ROWS, 3)],
            [list(one) for one in (scores.double() if target == "file" else teacher.view(ROWS, 3))],
        ),
    )
    ids = torch.ones(ROWS * 3, TOKENS, dtype=torch.long)
    whole = objective.divisors({"input_ids": ids})
    for rows in (slice(0, 4), slice(4, ROWS)):
        part = slice(rows.start * 3, rows.stop * 3)
        cut = {"input_ids": ids[part], "scores": scores[rows]}
        seen = Capture(logits=student[part]), Capture(logits=teacher[part])
        parts.append(objective(*seen, cut, objective.divisors(cut) / whole)[0])
    found = torch.stack(parts).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def test_a_head_with_several_outputs_gives_no_score() -> None:
    with pytest.raises(UserError, match=r"losses\.mine compares scores, but .* give 3 numbers; "):
        made({"loss": "score"}, PAIR, head="sequence_classification", outputs=3)
    with pytest.raises(UserError, match=r"losses\.mine\.dimensions has 7, but the student's"):
        made({"loss": "similarity", "dimensions": [7]}, PAIR)


@pytest.mark.parametrize("section", [{"loss": "similarity"}, {"loss": "similarity", **KL}], ids=str)
def test_one_sequence_has_no_others(section: dict[str, Any]) -> None:
    given = {"input_ids": torch.ones(1, TOKENS, dtype=torch.long)}
    student = drawn(1, TOKENS, NARROW, seed=1).requires_grad_()
    seen = Capture(outputs=student), Capture(outputs=drawn(1, TOKENS, WIDE, seed=2))
    objective = made(section, ("text",))
    value = objective(*seen, given, objective.divisors(given))[0]
    value.backward()
    assert value.item() == 0 and student.grad is not None and not student.grad.any()


def gathering(calls: Callable[[Batch], int], least: int) -> type[Loss]:
    """A loss that calls `batch.gather` so often, of what it has gathered last."""

    class Gathering(Loss):
        captures = Captures(outputs=True)
        least_rows = least

        def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
            assert student.outputs is not None
            found = student.outputs
            for _ in range(calls(batch)):
                found = batch.gather(found)
            return found.sum()

    return Gathering


@pytest.mark.parametrize(
    ("calls", "least", "said"),
    [
        (lambda batch: 1, 1, r"losses\.mine: .*: calls batch\.gather, but .* least_rows = 2"),
        (lambda batch: 2, 2, r"losses\.mine: .*: gathers other rows, or more often, when a step"),
        (
            lambda batch: len(batch.mask) // 2,
            2,
            r"losses: batch\.gather is called 1 and 0 and 1 times in the micro-batches of a step; ",
        ),
    ],
    ids=["undeclared", "twice", "unequal"],
)
def test_a_loss_that_gathers_in_another_way_is_refused(
    monkeypatch: pytest.MonkeyPatch, calls: Callable[[Batch], int], least: int, said: str
) -> None:
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    register_loss("odd")(gathering(calls, least))
    states = drawn(ROWS, TOKENS, NARROW, seed=1), drawn(ROWS, TOKENS, WIDE, seed=2)
    with pytest.raises(UserError, match=said):
        total(made({"loss": "odd"}, ("text",)), *states, inputs(1), 1, CUTS)


def test_other_losses_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    called: list[int] = []
    register_loss("odd")(gathering(lambda batch: called.append(1) or 0, 1))
    losses = Losses.model_validate({"similarity": {}, "odd": {}})
    layers, pair = make_layer_map("uniform", 2, 4), ModelPair(widths=(NARROW, WIDE))
    states = drawn(ROWS, TOKENS, NARROW, seed=1), drawn(ROWS, TOKENS, WIDE, seed=2)
    total(Objective(losses, layers, pair), *states, inputs(1), 1, CUTS)
    assert len(called) == len(CUTS)


@pytest.mark.parametrize(
    ("section", "plan", "recorded", "said"),
    [
        (
            {"loss": "similarity"},
            (1, 1, 1),
            False,
            r"losses\.mine compares the rows of a step, 2 at least, but one has 1; raise train",
        ),
        ({"loss": "rkd", "kind": "angle"}, (2, 1, 1), False, r"3 at least, but one has 2; raise"),
        ({"loss": "rkd"}, (1, 1, 1, 64), False, r"but one has 1; raise train\.batch_size"),
        ({"loss": "rkd"}, (2, 4, 1), True, r"train\.cuda_graph is on, but losses\.mine compares"),
    ],
)
def test_rows_that_can_not_be_compared_are_refused(
    section: dict[str, Any], plan: tuple[int, ...], recorded: bool, said: str
) -> None:
    objective = made(section, ("text",))
    with pytest.raises(UserError, match=said):
        check_gathering(objective, BatchPlan(*plan), recorded=recorded)
    check_gathering(objective, BatchPlan(4, 1, 1), recorded=recorded)
    check_gathering(objective, BatchPlan(1, 2, 2), recorded=False)
    check_gathering(made({"loss": "hidden"}, ("text",)), BatchPlan(*plan), recorded=recorded)
