"""Perplexity beside the losses: as transformers computes it, whatever the losses and the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_recipe
from tiny_tasks import masked_model
from transformers import PreTrainedModel

from benchmarks.family_models import family_model
from fastkd import distill
from fastkd.capture import token_loss
from fastkd.capture.finish import Finish
from fastkd.capture.token_loss import label_losses
from fastkd.distributed import start_ranks, stop_ranks
from fastkd.training.evaluate import evaluate
from fastkd.training.run_folder import RunFolder
from fastkd.training.setup import Run, set_up_evaluation
from fastkd.types import IGNORE_INDEX

TRAIN = {"steps": 2, "warmup_steps": 0, "batch_size": 6, "micro_batch_size": 3}


@pytest.mark.parametrize("finish", [Finish(), Finish(0.5, 3.0)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("logits", [1, 40, 1 << 24])
def test_label_losses_are_cross_entropies(
    logits: int, biased: bool, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    # parts of one word, of eight, of all
    monkeypatch.setattr(token_loss, "_LOGITS", logits)
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 6).double(), torch.randn(23, 6).double() * 3
    bias = torch.randn(23).double() if biased else None
    labels = torch.tensor([0, 7, 8, 22, 13])
    made = finish.of(torch.nn.functional.linear(hidden, weight, bias))
    expected = torch.nn.functional.cross_entropy(made, labels, reduction="none")
    assert torch.allclose(label_losses(hidden, weight, bias, labels, finish), expected, rtol=1e-12)
    # bf16 is read, not computed in
    half = hidden.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()
    wide = [None if part is None else part.double() for part in half]
    made = finish.of(torch.nn.functional.linear(*wide))
    expected = torch.nn.functional.cross_entropy(made, labels, reduction="none")
    assert torch.allclose(label_losses(*half, labels, finish).double(), expected, rtol=1e-5)


def heldout_perplexities(run: Run) -> list[float]:
    """By the models' own logits, of student and teacher, over blocks whose labels are given or are
    the next tokens."""
    found = []
    assert run.teacher_model is not None
    for model in (run.module.student, run.teacher_model):
        total = count = 0.0
        for batch in run.datamodule.heldout(64, run.ranks):
            ids = batch.inputs["input_ids"]
            with torch.no_grad():
                # an evaluation leaves the student as it trains
                logits = model.eval()(input_ids=ids).logits.double()
            labels = batch.inputs.get("labels")
            if labels is None:
                logits, labels = logits[:, :-1], ids[:, 1:]
            places = labels != IGNORE_INDEX
            chosen = logits[places].log_softmax(-1).gather(1, labels[places][:, None])
            total, count = total - chosen.sum().item(), count + len(chosen)
        found.append(math.exp(total / count))
    return found


def capped_model() -> PreTrainedModel:
    """A Gemma 2 whose soft cap shows in its logits."""
    model = family_model("gemma2", "causal_lm", vocab_size=64, final_logit_softcapping=0.3)
    model.get_output_embeddings().weight.data.mul_(8.0)
    return model


@pytest.mark.parametrize(
    ("architecture", "head", "losses", "name", "teacher"),
    [
        ("gpt2", "causal_lm", {"hidden": {}}, "perplexity", None),
        ("bert", "masked_lm", {"logits": {}, "mlm": {}}, "pseudo_perplexity", masked_model),
        ("gpt2", "causal_lm", {"logits": {}, "labels": {}}, "perplexity", capped_model),
    ],
)
def test_perplexity_is_that_of_the_models_own_logits(
    architecture: str,
    head: str,
    losses: dict[str, Any],
    name: str,
    teacher: Callable[[], PreTrainedModel] | None,
    tmp_path: Path,
) -> None:
    student = {"head": head, "attention": "eager"}
    recipe = make_recipe(tmp_path, architecture, student=student, train=TRAIN)
    if teacher is not None:
        teacher().save_pretrained(tmp_path / "teacher")
    nothing = {"attention": None, "hidden": None, "embedding": None}
    changes = {
        "teacher": {"model": str(tmp_path / "teacher"), "attention": "eager"},
        "losses": {**nothing, **losses},
    }
    result = distill(recipe, changes, quiet=True)
    summary = result.summary
    ranks = start_ranks()
    try:
        folder = RunFolder(result.folder)
        run = set_up_evaluation(folder.read_recipe(), folder, ranks)
        found = evaluate(run, judge_teacher=True)
        by_student, by_teacher = heldout_perplexities(run)
    finally:
        stop_ranks()
    assert found.judged[name] == pytest.approx(by_student, rel=1e-5)
    assert found.teacher == {name: pytest.approx(by_teacher, rel=1e-5)}
    assert summary["after"][name] == pytest.approx(by_student, rel=1e-5)
    assert summary["teacher"] == {name: pytest.approx(by_teacher, rel=1e-5)}
    assert abs(by_student - by_teacher) > 1e-2
    assert "perplexity" in (result.folder / "report.html").read_text()
