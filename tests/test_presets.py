"""Every preset's loss equals its paper's formula: full maps in fp64, none of fastkd's ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ot
import pytest
import torch
import transformers
from tiny_models import HEADS, LAYERS, WIDTH, tiny_batch, tiny_config
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize, softmax
from transformers import PreTrainedModel

from fastkd.capture import capture, try_model
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.losses import DIVISORS, model_inputs
from fastkd.losses.factory import make_objective
from fastkd.losses.objective import DistilledStudent, Objective
from fastkd.models import build_student
from fastkd.recipe import Recipe, parse_recipe
from fastkd.recipe.presets import PRESETS, expand
from fastkd.types import Inputs

LENGTHS = (9, 6, 4)
BATCH = tiny_batch(LENGTHS)
STUDENT = 3
UNIFORM = ((1, 1), (2, 3), (3, 4))
CLASSES = {
    "none": "AutoModel",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}


@dataclass
class Seen:
    """What one model computes, from its own outputs and weights; layer 0 is the embeddings."""

    hidden: list[Tensor]
    vectors: dict[str, list[Tensor]]
    logits: Tensor | None

    def scores(self, layer: int, left: str = "q", right: str = "k") -> Tensor:
        a, b = self.vectors[left][layer], self.vectors[right][layer]
        return a @ b.mT / a.shape[-1] ** 0.5


def seen(model: PreTrainedModel, inputs: Inputs, heads: int = HEADS) -> Seen:
    output = model(**model_inputs(inputs), output_hidden_states=True)
    vectors: dict[str, list[Tensor]] = {"q": [torch.empty(0)], "k": [torch.empty(0)], "v": []}
    vectors["v"] = [torch.empty(0)]
    for state, block in zip(output.hidden_states, model.base_model.encoder.layer, strict=False):
        own = block.attention.self
        for name, layer in (("q", own.query), ("k", own.key), ("v", own.value)):
            cut = layer(state).view(*state.shape[:2], heads, -1).transpose(1, 2)
            vectors[name].append(cut)
    return Seen(list(output.hidden_states), vectors, getattr(output, "logits", None))


@dataclass
class Case:
    """A recipe with a preset, its models in fp64, and its objective."""

    recipe: Recipe
    teacher: PreTrainedModel
    student: PreTrainedModel
    objective: Objective
    inputs: Inputs

    def losses(
        self, inputs: Inputs | None = None, shares: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Total, raw and weighted losses through fastkd, of the whole batch or of a part."""
        inputs = self.inputs if inputs is None else inputs
        shares = torch.ones(len(DIVISORS)) if shares is None else shares
        module = DistilledStudent(self.student, self.objective)
        with torch.no_grad(), capture(self.teacher, **self.objective.layers("teacher")) as states:
            self.teacher(**model_inputs(inputs))
        total, values = module(inputs, states, shares)
        return total, values[0], values[1]

    def look(self) -> tuple[Seen, Seen]:
        return seen(self.student, self.inputs), seen(self.teacher, self.inputs)

    def projected(self, state: Tensor) -> Tensor:
        found = dict(self.objective.named_parameters())
        weights = [value for name, value in found.items() if name.endswith("weight_0")]
        biases = [value for name, value in found.items() if name.endswith("bias_0")]
        return state @ weights[0].mT + biases[0] if weights else state


def datamodule(preset: str) -> dict[str, Any]:
    """What the method reads: examples with labels where it learns from them, else text."""
    if preset in ("pkd-skip", "pkd-last", "alp-kd", "rail-kd"):
        return {"task": {"name": "MRPC", "source": "none"}}
    return {"data": {"train": "none"}}


def case(preset: str, hidden_size: int = 24, **changes: Any) -> Case:
    tree = {
        "preset": preset,
        "teacher": {"model": "none"},
        "student": {"layers": STUDENT, "hidden_size": hidden_size},
        **datamodule(preset),
        "run": {"output": "none"},
        **changes,
    }
    recipe = parse_recipe(tree)
    head = recipe.student.head
    torch.manual_seed(0)
    config = tiny_config("bert", num_labels=3)
    teacher = getattr(transformers, CLASSES[head]).from_config(config).eval()
    teacher.requires_grad_(False)
    layers = make_layer_map(recipe.layer_map, STUDENT, LAYERS)
    torch.manual_seed(1)
    student = build_student(teacher, recipe.student, layers)[0].eval()
    traits = try_model(student), try_model(teacher)
    objective = make_objective(
        recipe.losses, layers, student, teacher, traits, head=recipe.student.head
    )
    for model in (teacher, student, objective):
        model.double()
    inputs = dict(BATCH)
    generator = torch.Generator().manual_seed(3)
    if head == "masked_lm":
        chosen = torch.rand(BATCH["input_ids"].shape, generator=generator) < 0.4
        chosen &= BATCH["attention_mask"].bool()
        inputs["labels"] = torch.where(chosen, BATCH["input_ids"], -100)
    elif head == "sequence_classification":
        inputs["labels"] = torch.tensor([2, 0, 1])
    return Case(recipe, teacher, student, objective, inputs)


def places() -> list[tuple[int, int]]:
    return [(b, length) for b, length in enumerate(LENGTHS)]


def kl(target: Tensor, own: Tensor) -> Tensor:
    """Of softmaxed scores over the last dimension."""
    t = softmax(target, -1)
    return (t * (log_softmax(target, -1) - log_softmax(own, -1))).sum(-1)


def mean_kl(target: Tensor, own: Tensor) -> Tensor:
    """Mean over heads and valid rows of [batch, heads, tokens, tokens], valid keys only."""
    rows = [kl(target[b, :, :n, :n], own[b, :, :n, :n]).flatten() for b, n in places()]
    heads = target.shape[1]
    return torch.cat(rows).sum() / (heads * sum(LENGTHS))


def valid_rows(tensor: Tensor) -> Tensor:
    """Rows [valid tokens, ...] of [batch, tokens, ...]."""
    return torch.cat([tensor[b, :n] for b, n in places()])


def plain_mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def masked_ce(c: Case, logits: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), c.inputs["labels"].flatten())


def soft_ce(target: Tensor, own: Tensor, temperature: float) -> Tensor:
    return -(softmax(target / temperature, -1) * log_softmax(own / temperature, -1)).sum(-1).mean()


def tinybert(c: Case, s: Seen, t: Seen) -> Tensor:
    keys = BATCH["attention_mask"].bool()[:, None, None, :]
    total = plain_mse(c.projected(s.hidden[0]), t.hidden[0])
    for mine, theirs in UNIFORM:
        total = total + plain_mse(c.projected(s.hidden[mine]), t.hidden[theirs])
        # the official code zeroes masked keys and averages over everything
        total = total + plain_mse(s.scores(mine) * keys, t.scores(theirs) * keys)
    return total


def distilbert(c: Case, s: Seen, t: Seen) -> Tensor:
    soft = kl(valid_rows(t.logits) / 2, valid_rows(s.logits) / 2).mean() * 4
    last = valid_rows(c.projected(s.hidden[3])), valid_rows(t.hidden[4])
    cosine = (1 - torch.cosine_similarity(*last, dim=-1)).mean()
    return 5 * soft + 2 * masked_ce(c, s.logits) + cosine


def pkd(pairs: list[tuple[int, int]]) -> Callable[[Case, Seen, Seen], Tensor]:
    def loss(c: Case, s: Seen, t: Seen) -> Tensor:
        own = torch.stack([c.projected(s.hidden[mine])[:, 0] for mine, _ in pairs])
        target = torch.stack([t.hidden[theirs][:, 0] for _, theirs in pairs])
        # the official code averages over layers, examples and dimensions
        patient = plain_mse(normalize(own, dim=-1), normalize(target, dim=-1))
        hard = cross_entropy(s.logits, c.inputs["labels"])
        # and over classes, of which a preset takes two
        soft = kl(t.logits / 10, s.logits / 10).mean() / 2 * 10**2
        return 0.5 * hard + 0.5 * soft + 100 * patient

    return loss


def minilm(c: Case, s: Seen, t: Seen) -> Tensor:
    values = mean_kl(t.scores(4, "v", "v"), s.scores(3, "v", "v"))
    return mean_kl(t.scores(4), s.scores(3)) + values


def minilmv2(c: Case, s: Seen, t: Seen) -> Tensor:
    cut = [seen(model, c.inputs, heads=8) for model in (c.student, c.teacher)]
    return sum(mean_kl(cut[1].scores(4, v, v), cut[0].scores(3, v, v)) for v in "qkv")


def mobilebert(c: Case, s: Seen, t: Seen) -> Tensor:
    total = 0.5 * kl(valid_rows(t.logits), valid_rows(s.logits)).mean()
    total = total + 0.5 * masked_ce(c, s.logits)
    for mine, theirs in UNIFORM:
        total = total + plain_mse(
            valid_rows(c.projected(s.hidden[mine])), valid_rows(t.hidden[theirs])
        )
        total = total + mean_kl(t.scores(theirs), s.scores(mine))
    return total


def alp_kd(c: Case, s: Seen, t: Seen) -> Tensor:
    total = cross_entropy(s.logits, c.inputs["labels"]) + soft_ce(t.logits, s.logits, 1.0)
    layers = torch.stack([state[:, 0] for state in t.hidden[1:]])
    for mine in (1, 2, 3):
        own = c.projected(s.hidden[mine])[:, 0]
        share = softmax(torch.einsum("bd,lbd->bl", own, layers), dim=-1).detach()
        total = total + plain_mse(own, torch.einsum("bl,lbd->bd", share, layers))
    return total


def rail_kd(c: Case, s: Seen, t: Seen) -> Tensor:
    def pooled(state: Tensor) -> Tensor:
        return torch.stack([state[b, :n].mean(0) for b, n in places()])

    drawn = [link.teachers[0] for link in c.objective.maps["hidden"].links(c.objective.moment)]
    total = cross_entropy(s.logits, c.inputs["labels"]) + kl(t.logits, s.logits).mean()
    for mine, theirs in zip((1, 2, 3), drawn, strict=True):
        own = normalize(c.projected(pooled(s.hidden[mine])), dim=-1)
        total = total + (own - normalize(pooled(t.hidden[theirs]), dim=-1)).square().sum(-1).mean()
    return total / 3


FORMULAS: dict[str, Callable[[Case, Seen, Seen], Tensor]] = {
    "tinybert": tinybert,
    "distilbert": distilbert,
    "pkd-skip": pkd([(1, 1), (2, 2)]),
    "pkd-last": pkd([(1, 2), (2, 3)]),
    "minilm": minilm,
    "minilmv2": minilmv2,
    "mobilebert": mobilebert,
    "alp-kd": alp_kd,
    "rail-kd": rail_kd,
}
# 48 relation heads don't divide the tiny models
CHANGES: dict[str, dict[str, Any]] = {"minilmv2": {"losses": {"relations": {"relation_heads": 8}}}}


@pytest.mark.parametrize("width", [24, WIDTH])
@pytest.mark.parametrize("preset", FORMULAS)
def test_the_loss_is_that_of_the_paper(preset: str, width: int) -> None:
    c = case(preset, width, **CHANGES.get(preset, {}))
    total, _, weighted = c.losses()
    total.backward()
    found = {name: p.grad.clone() for name, p in c.student.named_parameters() if p.grad is not None}
    c.student.zero_grad()
    expected = FORMULAS[preset](c, *c.look())
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weighted.sum(), total.detach(), rtol=1e-12, atol=1e-12)
    expected.backward()
    for name, p in c.student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sizes", [(1, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_is_the_same_however_it_is_cut(preset: str, sizes: tuple[int, ...]) -> None:
    c = case(preset, **CHANGES.get(preset, {}))
    whole, raw, weighted = c.losses()
    whole.backward()
    expected = gradients(c)
    divisors = c.objective.divisors(c.inputs).clamp(min=1)
    split = {name: tensor.split(sizes) for name, tensor in c.inputs.items()}
    sums = [torch.zeros_like(raw), torch.zeros_like(raw)]
    for number in range(len(sizes)):
        part = {name: tensors[number] for name, tensors in split.items()}
        total, *values = c.losses(part, c.objective.divisors(part) / divisors)
        total.backward()
        sums = [a + b for a, b in zip(sums, values, strict=True)]
    torch.testing.assert_close(sums[0], raw, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sums[1], weighted, rtol=1e-9, atol=1e-12)
    found = gradients(c)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


def gradients(c: Case) -> dict[str, Tensor]:
    """Of the student and the projections, which are cleared."""
    module = torch.nn.ModuleList([c.student, c.objective])
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def emd_costs(c: Case, s: Seen, t: Seen) -> dict[str, np.ndarray]:
    """Costs of all pairs: means over padding as well, as the official code has them, which zeroes
    masked keys."""
    keys = BATCH["attention_mask"].bool()[:, None, None, :]
    costs = {"attention": np.zeros((STUDENT, LAYERS)), "hidden": np.zeros((STUDENT, LAYERS))}
    for mine in range(STUDENT):
        for theirs in range(LAYERS):
            scores = s.scores(mine + 1) * keys, t.scores(theirs + 1) * keys
            costs["attention"][mine, theirs] = plain_mse(*scores)
            own = c.projected(s.hidden[mine + 1])
            costs["hidden"][mine, theirs] = plain_mse(own, t.hidden[theirs + 1])
    return costs


def cost_attention(spent: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    unit = spent.sum(axis=axis) / weights
    # the official code's `get_new_layer_weight`
    scores = unit.sum() / unit
    return scores / scores.sum()


@torch.no_grad()
def test_bert_emd_is_the_transport_of_an_exact_solver() -> None:
    c = case("bert-emd")
    assert c.objective.weights.needs_look
    c.objective.weights.observe(c.losses()[1])
    assert not c.objective.weights.needs_look
    s, t = c.look()
    costs = emd_costs(c, s, t)
    mine, theirs = np.full(STUDENT, 1 / STUDENT), np.full(LAYERS, 1 / LAYERS)
    embedded = plain_mse(c.projected(s.hidden[0]), t.hidden[0]).item()
    soft = soft_ce(t.logits, s.logits, 1.0).item()
    for _ in range(2):
        distances = [ot.emd2(mine, theirs, cost) for cost in costs.values()]
        total, raw, _ = c.losses()
        inside = sum(distances) + embedded
        # 0.01 of a cross-entropy that is a mean over two classes
        assert total.item() == pytest.approx(0.02 * inside + soft, rel=1e-9)
        flows = [ot.emd(mine, theirs, cost) for cost in costs.values()]
        spent = [cost * flow for cost, flow in zip(costs.values(), flows, strict=True)]
        mine, theirs = (
            np.mean([cost_attention(part, weights, axis) for part in spent], axis=0)
            for weights, axis in ((mine, 1), (theirs, 0))
        )
        c.objective.weights.observe(raw)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_documented_and_expands_to_a_recipe(preset: str) -> None:
    assert "arXiv" in (PRESETS[preset].__doc__ or "")
    given = {
        "preset": preset,
        "teacher": {"model": "a"},
        "student": {"layers": 3},
        **datamodule(preset),
        "run": {"output": "c"},
    }
    recipe = parse_recipe(given)
    again = parse_recipe(recipe.model_dump(mode="json"))
    assert again == recipe
    assert expand(expand(given)) == expand(given)


def test_what_the_user_gives_wins_key_by_key() -> None:
    own = {"losses": {"hidden": {"weight": 3.0}, "embedding": None}, "layer_map": "last"}
    tree = expand({"preset": "tinybert", **own})
    assert tree["losses"]["hidden"] == {"kind": "mse", "weight": 3.0}
    assert tree["losses"]["embedding"] is None
    assert tree["losses"]["attention"] == {"kind": "score_mse", "weight": 1.0}
    assert tree["layer_map"] == "last"
    other = expand({"preset": "bert-emd", "layer_map": {"kind": "random", "redraw": "step"}})
    assert other["layer_map"] == {"kind": "random", "redraw": "step"}


@pytest.mark.parametrize("given", ["tinybrt", 3, ["tinybert"]])
def test_an_unknown_preset_is_refused_by_name(given: object) -> None:
    with pytest.raises(UserError, match="recipe: preset: expected one of tinybert, distilbert"):
        parse_recipe({"preset": given})
