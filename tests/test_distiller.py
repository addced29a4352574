"""`Distiller`: the engine's losses in a loop of one's own, exact over micro-batches and ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_batch, tiny_config, tiny_model
from tiny_runs import make_recipe
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import fastkd
from fastkd.distributed import joined_ranks
from fastkd.errors import UserError
from fastkd.recipe import load_recipe
from fastkd.training.loop import train_step
from fastkd.training.setup import set_up

LOSSES = {"attention": {}, "hidden": {"weight": 2}, "embedding": {"weight": 0.5}}
SMALL = {"num_hidden_layers": 2, "hidden_size": 24}


def models(name: str = "bert", **student: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model(name, 1, **{**SMALL, **student}), tiny_model(name, 0).requires_grad_(False)


def headed(
    auto: Any, name: str = "bert", **student: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    teacher = auto.from_config(tiny_config(name)).eval().requires_grad_(False)
    return auto.from_config(tiny_config(name, **{**SMALL, **student})).eval(), teacher


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: value[rows] for name, value in batch.items()} for rows in ([0], [1, 2, 3])]


def gradients(distiller: fastkd.Distiller) -> list[Tensor]:
    found = [p.grad.clone() for p in distiller.parameters() if p.grad is not None]
    distiller.zero_grad()
    return found


def test_one_step_is_the_engines_bit_for_bit(tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe(tmp_path), ["student.dropout=0"])
    with joined_ranks() as ranks:
        run = set_up(recipe, ranks, progress=False)
        student, teacher = copy.deepcopy(run.module.student), copy.deepcopy(run.teacher_model)
        assert teacher is not None
        distiller = fastkd.Distiller(student, teacher, recipe.losses)
        distiller.objective.load_state_dict(run.objective.state_dict())
        (batch,) = map(run.move, run.micro_batches().next_step(0))
        with distiller:
            loss, parts = distiller(batch)
        raw, weighted = train_step(run, [batch])
    assert list(parts) == list(run.objective.labels)
    assert torch.equal(torch.stack(list(parts.values())), raw)
    assert torch.equal(loss.detach(), weighted.sum())


@pytest.mark.parametrize("balance", ["sum", "uncertainty"])
def test_micro_batches_add_up_to_the_step(balance: str) -> None:
    losses = LOSSES if balance == "sum" else {**LOSSES, "balance": balance}
    distiller = fastkd.Distiller(*models(), losses)
    batch = tiny_batch((12, 7, 3, 9))
    with distiller:
        whole, parts = distiller(batch)
        whole.backward()
        expected = gradients(distiller)
        cut = halves(batch)
        counts = torch.stack([distiller.count(piece) for piece in cut]).sum(dim=0)
        found = [distiller(piece, counts=counts) for piece in cut]
        sum((loss for loss, _ in found), torch.zeros(())).backward()
    added = torch.stack([loss.detach() for loss, _ in found]).sum()
    torch.testing.assert_close(added, whole.detach(), rtol=1e-6, atol=0)
    for label, value in parts.items():
        torch.testing.assert_close(found[0][1][label] + found[1][1][label], value)
    for one, other in zip(gradients(distiller), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # means of means are something else, so that the test can fail
    with distiller:
        means = torch.stack([distiller(piece)[0].detach() for piece in cut]).mean()
    assert (means - whole.detach()).abs() > 1e-2


def test_counts_are_the_callers_to_add_up() -> None:
    distiller = fastkd.Distiller(*models(), LOSSES)
    blocks = {"input_ids": tiny_batch((6, 6))["input_ids"]}
    first = distiller.count(blocks)
    first += first.clone()
    assert torch.equal(2 * distiller.count(blocks), first)
    # of the same shape, but another content
    assert distiller.count(tiny_batch((6, 3)))[1] == 9 < distiller.count(blocks)[1] == 12


def test_losses_choose_their_own_precision_under_autocast() -> None:
    distiller = fastkd.Distiller(*models(), {**LOSSES, "relations": {}})
    batch = tiny_batch()
    with distiller:
        expected = distiller(batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            found = distiller(batch)[0]
        found.backward()
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_models_are_left_as_found() -> None:
    student, teacher = models()
    teacher.train()
    before = [student.config._attn_implementation, teacher.config._attn_implementation]
    distiller = fastkd.Distiller(student, teacher, LOSSES)
    with distiller:
        assert not teacher.training
        assert student.config._attn_implementation.startswith("fastkd-")
        with distiller:
            distiller(tiny_batch())[0].backward()
    after = [student.config._attn_implementation, teacher.config._attn_implementation]
    assert after == before and teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_never_teaches_with_dropout() -> None:
    student, teacher = models()
    batch = tiny_batch()
    with torch.no_grad(), fastkd.Distiller(student, teacher, LOSSES) as distiller:
        expected = distiller(batch)[0]
        # as of a loop whose module holds the teacher too
        for module in (teacher, teacher.encoder):
            module.train()
            assert distiller(batch)[0] == expected
            assert not teacher.encoder.training


def test_parameters_are_the_students_and_the_projections() -> None:
    student, teacher = models()
    distiller = fastkd.Distiller(student, teacher, LOSSES)
    held = {id(parameter) for parameter in distiller.parameters()}
    assert {id(parameter) for parameter in student.parameters()} < held
    assert not held & {id(parameter) for parameter in teacher.parameters()}
    assert len(held) == len(list(student.parameters())) + 2
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"student", "objective"}
    distiller.train()
    assert student.training and not teacher.training


def test_projections_of_half_precision_have_all_their_digits() -> None:
    """In bf16 an update of a thousandth would be rounded away."""
    student, teacher = (tiny_model("bert", hidden_size=size).bfloat16() for size in (24, 32))
    losses = {"hidden": {}, "attention": {}, "balance": {"kind": "uncertainty"}}
    distiller = fastkd.Distiller(student, teacher.requires_grad_(False), losses)
    own = list(distiller.objective.parameters())
    assert own and {p.dtype for p in own} == {torch.float32}
    with distiller:
        loss, _ = distiller(tiny_batch())
        loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in own)


def test_a_seed_draws_projections_and_maps_and_nothing_else() -> None:
    random: dict[str, Any] = {"kind": "random", "redraw": "run"}
    # that of the distiller, and one of a loss
    losses = {"hidden": {}, "attention": {"layer_map": random}}

    def drawn(seed: int) -> tuple[Tensor, Any]:
        student, teacher = models(num_hidden_layers=1)
        torch.manual_seed(7)
        before = torch.get_rng_state()
        made = fastkd.Distiller(student, teacher, losses, random, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        weights = torch.cat([p.detach().flatten() for p in made.objective.parameters()])
        return weights, made.objective.linked

    first, again = drawn(1), drawn(1)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(first[0], drawn(1)[0])
    finally:
        torch.set_default_dtype(torch.float32)
    others = [drawn(seed) for seed in range(2, 6)]
    assert not any(torch.equal(first[0], weights) for weights, _ in others)
    for place, links in enumerate(first[1]):
        assert any(links != found[place] for _, found in others)


def test_a_student_in_half_precision_weighs_the_teachers_layers() -> None:
    losses, batch = {"hidden": {}}, tiny_batch()
    student, teacher = models()
    found = []
    for model in (student, copy.deepcopy(student).bfloat16()):
        with torch.no_grad(), fastkd.Distiller(model, teacher, losses, "attention") as distiller:
            found.append(distiller(batch)[0])
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=0)


def test_blocks_that_are_recomputed_within_a_backward_have_no_gradients() -> None:
    student, teacher = models()
    distiller = fastkd.Distiller(student, teacher, LOSSES)
    student.train()
    student.gradient_checkpointing_enable({"use_reentrant": True})
    said = r"losses.attention: .* has no gradient; .*under gradient checkpointing with use_reentr"
    with distiller, pytest.raises(UserError, match=said):
        distiller(tiny_batch())
    student.gradient_checkpointing_enable({"use_reentrant": False})
    with distiller:
        distiller(tiny_batch())[0].backward()


def test_batches_with_more_tokens_than_a_window_want_to_be_tried() -> None:
    models = [tiny_model("modernbert", seed, num_hidden_layers=2) for seed in (1, 2)]
    models[1].requires_grad_(False)
    width = models[0].config.local_attention
    batch = tiny_batch((width + 4, width + 2))
    said = r"may hide some \(\w+ \d+\), but both models were tried on 2; give Distiller"
    with (
        pytest.raises(UserError, match=said),
        fastkd.Distiller(*models, {"attention": {}}, tokens=2) as distiller,
    ):
        distiller(batch)
    # as long as it was tried on, or without attention
    for losses, tokens in (({"attention": {"kind": "kl"}}, width + 4), ({"hidden": {}}, 2)):
        with fastkd.Distiller(*models, losses, tokens=tokens) as distiller:
            assert torch.isfinite(distiller(batch)[0])


def test_projections_train() -> None:
    distiller = fastkd.Distiller(*models(), LOSSES)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in distiller.objective.parameters()]
    batch = tiny_batch()
    with distiller:
        first = distiller(batch)[0]
        first.backward()
        optimizer.step()
        assert distiller(batch)[0] < first
    after = list(distiller.objective.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_projections_have_their_own_learning_rate() -> None:
    rates = {"projection": "own", "projection_learning_rate": 0.5}
    losses = {"hidden": rates, "embedding": {}}
    distiller = fastkd.Distiller(*models(), losses)
    with distiller, pytest.raises(UserError, match=r"make it from distiller\.parameter_groups\(\)"):
        distiller(tiny_batch())
    optimizer = torch.optim.SGD(distiller.parameter_groups(), lr=1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(distiller.parameters())
    )
    own = dict(distiller.objective.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    with distiller:
        distiller(tiny_batch())[0].backward()
    optimizer.step()
    for name, rate in {"weight_0": 0.5, "bias_0": 0.5, "weight_1": 1e-3, "bias_1": 1e-3}.items():
        parameter, old = own[f"terms.0.{name}"], before[f"terms.0.{name}"]
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), old - rate * parameter.grad)


def test_a_schedule_follows_the_step() -> None:
    schedule = {"kind": "linear", "first": 0.0, "last": 1.0, "begin": 0.0, "end": 1.0}
    distiller = fastkd.Distiller(*models(), {"hidden": {"schedule": schedule}})
    batch = tiny_batch()
    with distiller, torch.no_grad():
        totals = []
        for step in (0, 5, 10):
            distiller.at(step, 10)
            totals.append(distiller(batch)[0].item())
    assert totals[0] == 0
    assert totals[1] == pytest.approx(totals[2] / 2)


def test_a_causal_models_labels_are_those_that_it_would_learn() -> None:
    student, teacher = headed(AutoModelForCausalLM, "gpt2")
    batch = tiny_batch((12, 7, 3))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    # a prompt that is not learned
    labels[:, :2] = -100
    losses = {"logits": {"weight": 0}, "labels": {}}
    with torch.no_grad(), fastkd.Distiller(student, teacher, losses) as distiller:
        _, parts = distiller({**batch, "labels": labels})
        expected = student(**batch, labels=labels).loss
        _, every = distiller(batch)
    torch.testing.assert_close(parts["labels"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(every["labels"], expected)


def answers(batch: dict[str, Tensor], prompts: tuple[int, ...]) -> Tensor:
    """Labels of what follows each prompt."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in enumerate(prompts):
        labels[row, :prompt] = -100
    return labels


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_a_causal_models_prompts_are_not_compared(kind: str) -> None:
    student, teacher = headed(AutoModelForCausalLM, "gpt2")
    batch = tiny_batch((12, 7, 3))
    # the last row has no answer
    labels = answers(batch, (2, 6, 3))
    losses = {"logits": {"kind": kind}, "labels": {}}
    distiller = fastkd.Distiller(student, teacher, losses)
    with torch.no_grad(), distiller:
        _, parts = distiller({**batch, "labels": labels})
        both = [model(**batch).logits.double() for model in (student, teacher)]
        rows = [{**rows_of(batch, n), "labels": labels[n : n + 1]} for n in range(3)]
        counts = sum(distiller.count(row) for row in rows)
        pieces = [distiller(row, counts)[1]["logits"] for row in rows]
    own, target = (of[:, :-1][labels[:, 1:] != -100] for of in both)
    if kind == "kl":
        each = torch.nn.functional.kl_div(
            own.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
    else:
        each = (own - target).square().mean(-1)
    assert len(each) == 10 + 1
    torch.testing.assert_close(parts["logits"].double(), each.mean(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sum(pieces), parts["logits"], rtol=1e-5, atol=1e-7)
    assert pieces[2] == 0


def rows_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: tensor[row : row + 1] for name, tensor in batch.items()}


def test_a_causal_models_labels_have_the_shape_of_its_ids() -> None:
    distiller = fastkd.Distiller(*headed(AutoModelForCausalLM, "gpt2"), {"logits": {}})
    batch = tiny_batch()
    with distiller, pytest.raises(UserError, match=r"losses.logits learns from labels of shape"):
        distiller({**batch, "labels": torch.zeros(3, 5)})


def test_masked_tokens_are_those_of_the_labels() -> None:
    student, teacher = headed(AutoModelForMaskedLM)
    batch = tiny_batch((12, 7, 3))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1] = batch["input_ids"][:, 1]
    with torch.no_grad(), fastkd.Distiller(student, teacher, {"logits": {}, "mlm": {}}) as own:
        _, parts = own({**batch, "labels": labels})
        expected = student(**batch, labels=labels).loss
    torch.testing.assert_close(parts["mlm"], expected, rtol=1e-5, atol=1e-6)


def test_labels_that_nothing_reads_may_have_any_shape() -> None:
    distiller = fastkd.Distiller(*models(), LOSSES)
    batch = tiny_batch()
    with distiller, torch.no_grad():
        expected = distiller(batch)[0]
        assert torch.equal(distiller({**batch, "labels": torch.zeros(3, 5)})[0], expected)


@pytest.mark.parametrize("rows", [VOCABULARY - 8, VOCABULARY + 8])
def test_tables_of_unlike_size_are_compared_in_what_both_have(rows: int) -> None:
    """As Qwen2.5's, whose tables end at unlike places behind the last word of one tokenizer."""
    student, teacher = headed(AutoModelForCausalLM, "llama", vocab_size=rows)
    distiller = fastkd.Distiller(student, teacher, {"logits": {}, "labels": {}})
    shared = min(rows, VOCABULARY)
    ids = torch.randint(shared, (2, 6), generator=torch.Generator().manual_seed(0))
    with distiller, torch.no_grad():
        _, parts = distiller({"input_ids": ids})
    with torch.no_grad():
        logits, targets = (model(ids).logits.double() for model in (student, teacher))
    q, p = (of[..., :shared].log_softmax(-1) for of in (logits, targets))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    hard = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(parts["logits"].double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(parts["labels"].double(), hard, rtol=1e-4, atol=1e-7)
    ids[1, 3] = shared
    side = "student" if rows < VOCABULARY else "teacher"
    with distiller, pytest.raises(UserError, match=f"the id {shared}, but the {side} embeds"):
        distiller({"input_ids": ids})


def _classifier(batch: Callable[[dict[str, Tensor]], Any]) -> Any:
    own = fastkd.Distiller(*headed(AutoModelForSequenceClassification), {"labels": {}})
    with own:
        return own(batch(tiny_batch()))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a teacher with gradients": (
        lambda: fastkd.Distiller(tiny_model("bert", **SMALL), tiny_model("bert"), LOSSES),
        r"teacher has 71 parameters with gradients, such as .*requires_grad_\(False\)",
    ),
    "the same model twice": (
        lambda: fastkd.Distiller(*[tiny_model("bert").requires_grad_(False)] * 2, LOSSES),
        "student and teacher share",
    ),
    "a deeper student": (
        lambda: fastkd.Distiller(*models(num_hidden_layers=5), LOSSES),
        "the student has 5 layers and the teacher 4",
    ),
    "no model": (
        lambda: fastkd.Distiller(torch.nn.Linear(2, 2), models()[1], LOSSES),
        "the student is a Linear, expected a model of transformers",
    ),
    "a loss that is none": (
        lambda: fastkd.Distiller(*models(), {"hiden": {}}),
        "losses.hiden: unknown key; did you mean 'hidden'",
    ),
    "losses that are none": (
        lambda: fastkd.Distiller(*models(), 3),  # type: ignore[arg-type]
        "losses: expected a section with keys",
    ),
    "a map of another length": (
        lambda: fastkd.Distiller(*models(), LOSSES, [1]),
        "layer_map",
    ),
    "a map that is none": (
        lambda: fastkd.Distiller(*models(), LOSSES, "unform"),
        "layer_map: expected uniform",
    ),
    "a loss of heads without heads": (
        lambda: fastkd.Distiller(*models(), {"logits": {}}),
        "losses.logits is on, but .* none",
    ),
    "weights that follow steps": (
        lambda: fastkd.Distiller(*models(), {**LOSSES, "balance": "ratio"}),
        "losses.balance ratio and layer_map emd follow the losses of whole steps",
    ),
    "embeddings that nothing says": (
        lambda: fastkd.Distiller(*models(), {"embedding_output": {}}),
        "losses.embedding_output.pooling is not given, and a Distiller sees two transformers",
    ),
    "no context": (
        lambda: fastkd.Distiller(*models(), LOSSES)(tiny_batch()),
        "call it inside `with distiller:`",
    ),
    "no input_ids": (
        lambda: fastkd.Distiller(*models(), LOSSES).count({"x": torch.ones(2)}),
        "the batch has the keys x, and input_ids of none; expected input_ids",
    ),
    "a mask of another shape": (
        lambda: fastkd.Distiller(*models(), LOSSES).count(
            {**tiny_batch(), "attention_mask": torch.ones(3, 1)}
        ),
        r"attention_mask is \[3, 1\], expected \[3, 12\]",
    ),
    "a key that nothing reads": (
        lambda: fastkd.Distiller(*models(), LOSSES).count({**tiny_batch(), "idx": torch.ones(3)}),
        "the student BertModel reads no idx",
    ),
    "texts in one row": (
        lambda: fastkd.Distiller(*models(), LOSSES).count(
            {"input_ids": torch.ones(1, 5).long(), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
        ),
        "position_ids begin anew within a row, so it holds several texts",
    ),
    "no labels": (
        lambda: _classifier(lambda batch: batch),
        r"losses.labels learns from labels of shape \[3\], but those of the batch are missing",
    ),
    "labels of another shape": (
        lambda: _classifier(lambda batch: {**batch, "labels": torch.zeros(3, 2)}),
        r"losses.labels learns from labels of shape \[3\], but those of the batch are \[3, 2\]",
    ),
    "labels of another kind": (
        lambda: _classifier(lambda batch: {**batch, "labels": torch.zeros(3).int()}),
        r"losses.labels learns from labels .* torch.int32, expected torch.int64",
    ),
    "a label that is no class": (
        lambda: _classifier(lambda batch: {**batch, "labels": torch.tensor([0, 2, -100])}),
        "losses.labels learns from the label 2, but there are 2 classes",
    ),
    "a label that is no token": (
        lambda: fastkd.Distiller(
            *headed(AutoModelForCausalLM, "llama"), {"logits": {}, "labels": {}}
        ).count({"input_ids": torch.ones(1, 3).long(), "labels": torch.tensor([[-1, 2, -1]])}),
        "losses.logits learns from the label -1, but there are 64 tokens",
    ),
    "a batch of nothing": (
        lambda: fastkd.Distiller(*models(), LOSSES).count({"input_ids": torch.ones(0, 5).long()}),
        r"input_ids of the batch are \[0, 5\], expected tokens",
    ),
    "a step that is none": (
        lambda: fastkd.Distiller(*models(), LOSSES).at(11, 10),
        "step 11 of 10",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str) -> None:
    act, said = BAD[name]
    with pytest.raises(fastkd.UserError, match=said) as refused:
        act()
    assert "\n" not in str(refused.value)
