"""What a model makes of its last layer's output is found, and is in its losses and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import LogitsHead
from fastkd_kernels.logits_divergence.reference import logits_of
from fastkd_kernels.reference import logits_divergence
from tiny_models import CAUSAL, tiny_batch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.family_models import family_model
from fastkd import Distiller
from fastkd.capture import capture, route_attention, try_model
from fastkd.capture.finish import Finish, known_finish
from fastkd.capture.token_loss import heard_token_loss
from fastkd.errors import UserError
from fastkd.training.teacher_cache.layout import constant_part
from fastkd.types import IGNORE_INDEX

BATCH = tiny_batch((9, 7))
IDS = {"input_ids": torch.arange(1, 9)[None]}
FINISHES: list[tuple[str, dict[str, Any], Finish]] = [
    ("llama", {}, Finish()),
    ("granite", {"logits_scaling": 8.0}, Finish(1 / 8)),
    ("granitemoe", {"logits_scaling": 6.0}, Finish(1 / 6)),
    ("cohere", {"logit_scale": 0.0625}, Finish(0.0625)),
    ("cohere2", {"logit_scale": 0.3}, Finish(0.3)),
    ("falcon_h1", {"lm_head_multiplier": 0.1}, Finish(0.1)),
    ("gemma2", {"final_logit_softcapping": 30.0}, Finish(1.0, 30.0)),
    ("gemma2", {"final_logit_softcapping": 0.7}, Finish(1.0, 0.7)),
    ("gemma2", {"final_logit_softcapping": None}, Finish()),
    ("vaultgemma", {"final_logit_softcapping": 5.0}, Finish(1.0, 5.0)),
    ("nanochat", {"final_logit_softcapping": 15.0}, Finish(1.0, 15.0)),
]


def language_model(family: str, changes: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return family_model(family, "causal_lm", **changes).eval()


def hooked(change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A Llama whose last layer's output is changed before it is handed on."""
    model = language_model("llama", {})
    model.get_output_embeddings().register_forward_hook(lambda _layer, _given, made: change(made))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "changes", "finish"), FINISHES)
def test_what_models_make_of_their_logits_is_found(
    family: str, changes: dict[str, Any], finish: Finish, dtype: torch.dtype
) -> None:
    """Exactly, and of models that have not learned, whose logits are far below any cap."""
    model = language_model(family, changes).to(dtype)
    model.get_output_embeddings().weight.data.mul_(1e-3)
    try_model(model)
    found = known_finish(model)
    assert found is not None
    assert found.softcap == finish.softcap
    assert math.isclose(found.scale, finish.scale, rel_tol=1e-15)


def test_a_factor_and_a_cap_are_told_apart_also_in_fp32() -> None:
    model = hooked(lambda made: torch.tanh(made.float() * 0.3 / 20.0) * 20.0)
    try_model(model)
    found = known_finish(model)
    assert found is not None and found.softcap == 20.0
    assert math.isclose(found.scale, 0.3, rel_tol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made + 1.0,
        lambda made: made.log_softmax(-1),
        lambda made: made.flip(-1),
        lambda made: made.clamp(max=30.0),
        lambda made: made * torch.linspace(0.5, 1.5, made.shape[-1]),
        lambda made: made[..., :-1],
        lambda made: made * 0.0,
        # too few digits to tell the factor by
        lambda made: (made * 0.3).bfloat16(),
    ],
)
def test_anything_else_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    message = "LlamaForCausalLM makes more of its last layer's output than a factor and a soft cap"
    with pytest.raises(UserError, match=message):
        try_model(hooked(change))


def test_the_layer_is_left_as_it_was() -> None:
    model = language_model("gemma2", {})
    layer = model.get_output_embeddings()
    before = {**vars(layer)}
    try_model(model)
    assert vars(layer) == before


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {"final_logit_softcapping": 0.2}), ("granite", {"logits_scaling": 0.05})],
)
def test_losses_and_gradients_are_those_of_the_models_own_logits(
    family: str, changes: dict[str, Any], kind: str
) -> None:
    student, teacher = (language_model(family, changes, seed).double() for seed in (0, 1))
    teacher.requires_grad_(False)
    # sizes at which a cap shows
    for model in (student, teacher):
        model.get_output_embeddings().weight.data.mul_(20.0)
    with Distiller(student, teacher, {"logits": {"kind": kind}, "labels": {}}) as distiller:
        given = {
            **BATCH,
            "labels": BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100),
        }
        loss, _ = distiller(given)
        loss.backward()
    made = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    shown = BATCH["attention_mask"].bool()
    mask = shown[:, :-1] & shown[:, 1:]
    labels = given["labels"][:, 1:]
    own, target = (model(**BATCH).logits[:, :-1] for model in (student, teacher))
    expected = sum(logits_divergence(own, target.detach(), kind=kind, mask=mask, labels=labels))
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    assert made.keys() == {n for n, p in student.named_parameters() if p.grad is not None}
    for name, parameter in student.named_parameters():
        if name in made:
            size = float(parameter.grad.abs().max())
            torch.testing.assert_close(made[name], parameter.grad, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize(("family", "changes", "_finish"), FINISHES[1::3])
def test_perplexity_is_of_the_models_own_logits(
    family: str, changes: dict[str, Any], _finish: Finish
) -> None:
    """Also of a model that was not tried before."""
    model = language_model(family, changes)
    model.get_output_embeddings().weight.data.mul_(20.0)
    labels = torch.full_like(IDS["input_ids"], IGNORE_INDEX)
    labels[:, :-1] = IDS["input_ids"][:, 1:]
    with torch.no_grad(), heard_token_loss(model, torch.device("cpu")) as heard:
        logits = model(**IDS).logits
        heard.labels = labels
        model(**IDS)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, :-1])
    assert math.isclose(float(heard.sum / heard.count), float(expected), rel_tol=1e-5)


def test_a_model_that_was_not_tried_is_asked_before_anything_listens() -> None:
    model = language_model("gemma2", {"final_logit_softcapping": 5.0})
    route_attention(model, "eager")
    with torch.no_grad():
        expected = model(**IDS).logits
        everything = capture(model, attention=(1, 2), hidden=(0, 2), outputs=True, logits=True)
        with everything as states:
            model(**IDS)
    assert isinstance(states.logits, LogitsHead)
    assert torch.allclose(logits_of(states.logits), expected, atol=1e-6)


def test_a_teachers_cache_keeps_it() -> None:
    model = language_model("gemma2", {"final_logit_softcapping": 5.0})
    with torch.no_grad(), capture(model, logits=True) as states:
        model(**IDS)
    kept = constant_part(states).logits
    assert isinstance(kept, LogitsHead)
    assert (kept.scale, kept.softcap) == (1.0, 5.0)


def test_other_families_have_none() -> None:
    for name in CAUSAL:
        model = language_model(name, {})
        try_model(model)
        assert known_finish(model) == Finish()
