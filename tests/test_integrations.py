"""`DistillationTrainer`: a Trainer with a teacher, exact over micro-batches, resumed to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_batch, tiny_config, tiny_model
from tiny_runs import run_script
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import fastkd

pytestmark = pytest.mark.usefixtures("own_accelerator")

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

LOSSES = {"attention": {}, "hidden": {"weight": 2}, "logits": {}, "labels": {}}
UNREAD = {"hidden": {"layer_map": [[1, 2]]}}
"""Of the first of the student's two layers: the other one has no gradient."""


def classifier(seed: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = tiny_config("bert", **changes)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def student(**changes: Any) -> PreTrainedModel:
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return classifier(1, **{"num_hidden_layers": 2, "hidden_size": 24, **none, **changes})


def examples(count: int, *, labels: bool = True) -> list[dict[str, Any]]:
    """Of different lengths, so that means of means are no means."""
    found = []
    for number in range(count):
        batch = tiny_batch((3 + 5 * number % 11,), seed=number)
        row = {name: value[0].tolist() for name, value in batch.items()}
        found.append({**row, **({"labels": number % 2} if labels else {})})
    return found


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def trainer(
    folder: Path,
    model: PreTrainedModel | None,
    losses: Any = LOSSES,
    beside: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer with arguments `changes`, and `beside` them."""
    from transformers import TrainingArguments

    from fastkd.integrations import DistillationTrainer

    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return DistillationTrainer(
        model=model,
        args=TrainingArguments(str(folder), **settings),
        train_dataset=examples(24),
        eval_dataset=examples(8),
        data_collator=collate,
        losses=losses,
        **{"teacher": classifier(0).requires_grad_(False), **(beside or {})},
    )


def weights(made: Any) -> list[Tensor]:
    return [*made.model.parameters(), *made.distiller.objective.parameters()]


def losses_of(made: Any) -> list[float]:
    return [line["loss"] for line in made.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer(tmp_path_factory.mktemp("whole"), student())
    before = [weight.detach().clone() for weight in made.distiller.objective.parameters()]
    made.train()
    changed = zip(before, made.distiller.objective.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in changed), "the projections train"
    return made


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """In fp64: Adam makes a step of the rounding of a small gradient."""
    halved = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    teacher = {"teacher": classifier(0).requires_grad_(False).double()}
    whole, made = (
        trainer(tmp_path, student().double(), beside=teacher, **changes) for changes in ({}, halved)
    )
    for one in (whole, made):
        one.train()
    assert losses_of(made) == pytest.approx(losses_of(whole), rel=1e-6)
    for one, other in zip(weights(made), weights(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_loop_with_accelerate_is_the_plain_one() -> None:
    accelerate = pytest.importorskip("accelerate")
    teacher = classifier(0).requires_grad_(False)
    pair = [fastkd.Distiller(student(), teacher, LOSSES) for _ in range(2)]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizers = [torch.optim.SGD(one.parameters(), lr=1e-2) for one in pair]
    own, prepared = optimizers[0], accelerator.prepare(pair[1], optimizers[1])
    batches = [collate(examples(8)[rows]) for rows in (slice(3), slice(3, 8))]
    with pair[0]:
        pair[0](collate(examples(8)))[0].backward()
        own.step()
    with pair[1]:
        counts = torch.stack([pair[1].count(batch) for batch in batches]).sum(dim=0)
        for batch in batches:
            with accelerator.accumulate(prepared[0]):
                # accelerate averages over the two
                loss, _ = prepared[0](batch, counts=counts, pieces=2)
                accelerator.backward(loss)
                prepared[1].step()
    for one, other in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_first_loss_is_the_distillers(whole: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, student())
    batch = next(iter(made.get_train_dataloader()))
    with torch.no_grad(), fastkd.Distiller(student(), classifier(0).requires_grad_(False), LOSSES,
                                           seed=made.args.seed) as own:  # fmt: skip
        own.train()
        expected, _ = own(batch)
    # the first batch that the run saw is another draw of the order; this one is held alone
    with made._distilling(), torch.no_grad():
        found = made._loss([batch], None, 1)
    assert torch.equal(found, expected)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    one = trainer(tmp_path / "one", student(**rates))
    one.train()
    other = trainer(tmp_path / "other", student(**rates))
    other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_what_is_saved_is_the_student(whole: Any, tmp_path: Path) -> None:
    whole.save_model(str(tmp_path))
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    saved, mine = found.state_dict(), whole.model.state_dict()
    assert saved.keys() == mine.keys() and not [key for key in saved if "fastkd" in key]
    assert all(torch.equal(saved[key], mine[key]) for key in saved)
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    assert not [key for key in load_file(checkpoint / "model.safetensors") if "fastkd" in key]
    kept = load_file(checkpoint / "projections.safetensors")
    assert kept.keys() == whole.distiller.objective.state_dict().keys()


def test_the_model_is_left_as_found(whole: Any) -> None:
    assert whole.model.config._attn_implementation == "sdpa"
    assert "forward" not in whole.model.__dict__
    assert not hasattr(whole.model, "fastkd_losses")


def test_evaluation_and_prediction(whole: Any) -> None:
    found = whole.evaluate()
    predicted = whole.predict(examples(8))
    assert predicted.predictions.shape == (8, 2) and predicted.label_ids.shape == (8,)
    batch = collate(examples(8))
    with torch.no_grad():
        logits = whole.model(**batch).logits
        with whole.distiller:
            expected, _ = whole.distiller(batch)
    torch.testing.assert_close(torch.tensor(predicted.predictions), logits, rtol=1e-5, atol=1e-6)
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert predicted.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_predictions_need_no_labels(whole: Any, tmp_path: Path) -> None:
    unlabelled = examples(8, labels=False)
    found = whole.predict(unlabelled)
    with torch.no_grad():
        logits = whole.model(**collate(unlabelled)).logits
    torch.testing.assert_close(torch.tensor(found.predictions), logits, rtol=1e-5, atol=1e-6)
    assert found.label_ids is None and "test_loss" not in found.metrics
    with pytest.raises(fastkd.UserError, match=r"losses\.labels learns from labels"):
        whole.evaluate(unlabelled)
    others = trainer(tmp_path, student(), {"logits": {}})
    assert others.predict(unlabelled).metrics["test_loss"] > 0


def test_text_without_labels_has_a_loss(tmp_path: Path) -> None:
    made = trainer(tmp_path, student(), {"hidden": {}})
    made.train_dataset, made.eval_dataset = (examples(n, labels=False) for n in (24, 8))
    made.train()
    assert made.evaluate()["eval_loss"] < losses_of(made)[0]


def copies(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def test_an_optimizer_made_before_training_trains_the_projections(tmp_path: Path) -> None:
    losses = {"hidden": {}, "labels": {}, "balance": "uncertainty"}
    made = trainer(tmp_path, student(), losses, max_steps=1)
    made.create_optimizer()
    before = copies(made.distiller.parameters())
    made.train()
    own = list(made.distiller.objective.parameters())
    assert len(own) == 3 and made.optimizer.param_groups[1]["weight_decay"] == 0
    changed = zip(before[-3:], own, strict=True)
    assert not any(torch.equal(a, b) for a, b in changed)


def test_an_optimizer_of_the_student_alone_is_refused(tmp_path: Path) -> None:
    model = student()
    alone = torch.optim.SGD(model.parameters(), lr=0.1)
    made = trainer(tmp_path, model, beside={"optimizers": (alone, None)}, max_steps=1)
    said = r"lacks 2 parameters of the losses, such as terms.*, or set trainer\.optimizer to one"
    with pytest.raises(fastkd.UserError, match=said):
        made.train()
    with pytest.raises(fastkd.UserError, match=said):
        made.create_scheduler(1, alone)
    made.optimizer = torch.optim.SGD(made.distiller.parameters(), lr=0.1)
    before = copies(made.distiller.objective.parameters())
    made.train()
    after = made.distiller.objective.parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_projections_have_their_own_learning_rate(tmp_path: Path) -> None:
    losses = {"hidden": {"projection": "own", "projection_learning_rate": 0.5}, "embedding": {}}
    made = trainer(tmp_path, student(), losses, max_steps=1, learning_rate=1e-3)
    own = dict(made.distiller.objective.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    made.train()
    moved = {name: (own[name] - old).abs().max().item() for name, old in before.items()}
    # the first update of Adam is the learning rate, whatever the gradient
    expected = {"weight_0": 0.5, "bias_0": 0.5, "weight_1": 1e-3, "bias_1": 1e-3}
    assert moved == pytest.approx({f"terms.0.{n}": size for n, size in expected.items()}, rel=1e-2)
    made.optimizer = torch.optim.SGD(made.distiller.parameters(), lr=0.1)
    with pytest.raises(fastkd.UserError, match=r"doesn't have the projection_learning_rate 0\.5"):
        made.train()
    made.optimizer = torch.optim.SGD(made.distiller.parameter_groups(), lr=1e-3)
    made.train()


def test_held_out_losses_know_no_schedule_and_no_learned_weight(tmp_path: Path) -> None:
    cold = {"first": 1.0, "last": 5.0}
    losses = {
        "hidden": {"weight": 2, "schedule": {"first": 0.1, "last": 1.0}},
        "attention": {"kind": "kl", "temperature": 2, "temperature_schedule": cold},
        "balance": "uncertainty",
    }
    still = {"learning_rate": 0.0, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    made = trainer(tmp_path, student(), losses, **still)
    made.train()
    found = [line["eval_loss"] for line in made.state.log_history if "eval_loss" in line]
    constant = {"hidden": {"weight": 2}, "attention": {"kind": "kl", "temperature": 2}}
    own = fastkd.Distiller(made.model, classifier(0).requires_grad_(False), constant)
    own.objective.load_state_dict(made.distiller.objective.kept())
    with torch.no_grad(), own:
        expected = own(collate(examples(8)))[0].item()
    assert found == pytest.approx([expected] * 3, rel=1e-6)
    # training goes on where it stood
    assert made.distiller.objective.moment.step == 2
    assert len({round(loss, 4) for loss in losses_of(made)}) == 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks of `ddp_trainer.py` found."""
    done = run_script("ddp_trainer.py", str(tmp_path_factory.mktemp("ranks")), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_ranks_change_nothing(whole: Any, ranks: dict[str, Any]) -> None:
    assert ranks["loss"] == pytest.approx(losses_of(whole), rel=1e-5)
    # nor does an evaluation before the first step
    assert ranks["evaluated"] == pytest.approx(losses_of(whole), rel=1e-5)


def test_ranks_look_for_weights_without_a_gradient(ranks: dict[str, Any], tmp_path: Path) -> None:
    alone = trainer(tmp_path, student(), UNREAD)
    alone.train()
    assert ranks["recomputed"] == pytest.approx(losses_of(alone), rel=1e-5)
    assert "ddp_find_unused_parameters is False, but no loss reads" in ranks["told"]


def test_ranks_that_would_train_apart_are_refused(ranks: dict[str, Any]) -> None:
    assert "is a BertForSequenceClassification, expected DistributedDataParallel" in ranks["bare"]


def test_what_would_bypass_the_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fastkd.UserError, match="label_smoothing_factor is set"):
        trainer(tmp_path, student(), label_smoothing_factor=0.1)
    with pytest.raises(fastkd.UserError, match="model_init is given, which makes a new student"):
        trainer(tmp_path, None, beside={"model_init": lambda: student()})
    with pytest.raises(fastkd.UserError, match="make a trainer for each trial"):
        trainer(tmp_path, student()).hyperparameter_search()
    with pytest.raises(fastkd.UserError, match="losses is not given"):
        trainer(tmp_path, student(), None)
    with pytest.raises(fastkd.UserError, match="the student has 5 layers and the teacher 4"):
        trainer(tmp_path, student(num_hidden_layers=5))
    with pytest.raises(fastkd.UserError, match="model is a Linear, expected a model of transf"):
        trainer(tmp_path, torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_checkpoint_of_another_trainer_is_refused(whole: Any, tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "checkpoint-1")
    made = trainer(tmp_path, student())
    with pytest.raises(fastkd.UserError, match=r"holds no projections\.safetensors"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


WRITTEN = r"checkpoint-2 was written with "


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            {"logits": {}, "labels": {}},
            WRITTEN + r"the losses attention/1-2, .*, but those of the trainer are logits, labels;",
        ),
        (
            {**LOSSES, "projection": "per_pair"},
            WRITTEN + r"another setting .*: of terms\.1\.weight_\d it has",
        ),
        (
            {**LOSSES, "balance": "uncertainty"},
            WRITTEN
            + r".*: of uncertainty\.log_variances it has none, .* have \[4\]; give the same",
        ),
        (
            {**LOSSES, "projection_learning_rate": 0.1},
            WRITTEN + r"the projection learning rates {}, .* \{\"terms\.1\.bias.*\": 0\.1",
        ),
    ],
)
def test_a_checkpoint_of_other_losses_is_refused(
    whole: Any, tmp_path: Path, losses: dict[str, Any], said: str
) -> None:
    made = trainer(tmp_path, student(), losses)
    before = copies(made.model.parameters())
    with pytest.raises(fastkd.UserError, match=said):
        made.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))


def test_transformers_is_loaded_when_it_is_used() -> None:
    code = "import sys, fastkd.integrations; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# last: an Accelerator takes the precision of the one before it in the process
def test_mixed_precision_comes_near(whole: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, student(), bf16=True)
    made.train()
    assert losses_of(made) == pytest.approx(losses_of(whole), rel=2e-2)
    assert losses_of(made) != losses_of(whole)
    assert {weight.dtype for weight in weights(made)} == {torch.float32}
    assert made.evaluate()["eval_loss"] < losses_of(made)[0]
    assert not torch.is_autocast_enabled("cpu")
