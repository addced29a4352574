"""Heads are recorded without making logits, and say the same as the logits of the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from fastkd_kernels import LogitsHead
from fastkd_kernels.logits_divergence.reference import logits_of
from tiny_models import CAUSAL, tiny_batch, tiny_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.family_models import family_model
from fastkd import Distiller
from fastkd.capture import capture, capture_keywords, route_attention, try_model
from fastkd.capture.lm_head import check_head, last_hidden_state
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.losses import DIVISORS, ModelPair, count_divisors, target_labels
from fastkd.losses.objective import Objective
from fastkd.models import build_student
from fastkd.recipe import Losses, Student
from fastkd.types import IGNORE_INDEX

BATCH = tiny_batch((9, 5, 3))
LANGUAGE_MODELS = [
    *((name, "AutoModelForCausalLM") for name in CAUSAL),
    *((n, "AutoModelForMaskedLM") for n in ("bert", "roberta", "distilbert", "modernbert")),
]
WHOLE = torch.ones(len(DIVISORS))


def model_with(name: str, head: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, head).from_config(tiny_config(name, **changes))
    route_attention(model, "sdpa")
    return model.eval()


@pytest.mark.parametrize(("name", "head"), LANGUAGE_MODELS)
def test_a_language_models_logits_are_those_of_what_is_recorded(name: str, head: str) -> None:
    model = model_with(name, head)
    try_model(model)
    with torch.no_grad():
        given = model(**BATCH, **capture_keywords(model)).logits
        with capture(model, hidden=(2,), logits=True) as states:
            skipped = model(**BATCH, **capture_keywords(model)).logits
        again = model(**BATCH, **capture_keywords(model)).logits
    assert skipped.shape == (*BATCH["input_ids"].shape, 0)
    assert isinstance(states.logits, LogitsHead)
    assert states.logits.weight is model.get_output_embeddings().weight
    made = logits_of(states.logits)
    torch.testing.assert_close(made, given, atol=1e-5, rtol=1e-5)
    assert torch.equal(again, given)


@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert"])
def test_a_classifiers_logits_are_recorded_as_they_are(name: str) -> None:
    model = model_with(name, "AutoModelForSequenceClassification", num_labels=3)
    with torch.no_grad():
        given = model(**BATCH, **capture_keywords(model)).logits
        with capture(model, logits=True) as states:
            model(**BATCH, **capture_keywords(model))
    assert isinstance(states.logits, Tensor)
    assert torch.equal(states.logits, given)


@pytest.mark.parametrize(("name", "head"), [*LANGUAGE_MODELS[:2], ("bert", "AutoModel")])
def test_the_state_below_the_head_is_that_of_the_base_model(name: str, head: str) -> None:
    model = model_with(name, head)
    read = {**BATCH, **capture_keywords(model)}
    with torch.no_grad():
        expected = model.base_model(**read).last_hidden_state
        assert torch.equal(last_hidden_state(model, model, read), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_that_are_handed_on_in_another_dtype_are_taken(dtype: torch.dtype) -> None:
    """Nemotron-H makes them in its weights' dtype and hands them on in fp32."""
    model = family_model("nemotron_h", "causal_lm").to(dtype).eval()
    inputs = {"input_ids": torch.arange(8)[None]}
    with torch.no_grad():
        assert model(**inputs).logits.dtype == torch.float32
    check_head(model, inputs)
    shifted = model.lm_head.register_forward_hook(lambda _layer, _given, made: made + 1.5)
    with pytest.raises(UserError, match="makes more of its last layer's output than a factor"):
        check_head(model, inputs)
    shifted.remove()


class Adapted(nn.Module):
    """A linear layer with an adapter beside it that does nothing yet."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, state: Tensor) -> Tensor:
        return self.base(state) + self.up(self.down(state))


class Replaced(nn.Module):
    """A linear layer that a trained one stands in for."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.original = base.requires_grad_(False)
        self.active = copy.deepcopy(base).requires_grad_(True)
        self.weight, self.bias = self.active.weight, self.active.bias

    def forward(self, state: Tensor) -> Tensor:
        return self.active(state)


def with_last_layer(change: Callable[[nn.Module], nn.Module]) -> PreTrainedModel:
    """A Llama that trains its last layer alone, which is another one now."""
    model = model_with("llama", "AutoModelForCausalLM", tie_word_embeddings=False)
    model.requires_grad_(False)
    model.lm_head = change(model.lm_head.requires_grad_(True))
    return model


def test_an_adapter_of_the_last_layer_that_trains_is_refused() -> None:
    """Logits are made of weight and bias alone: it would be left out, and never learn."""
    student = with_last_layer(Adapted)
    message = r"LlamaForCausalLM: its last layer \(Adapted\) trains down.weight beside its weight"
    with pytest.raises(UserError, match=message):
        try_model(student)
    teacher = with_last_layer(Adapted).requires_grad_(False)
    with pytest.raises(UserError, match=message):
        Distiller(student, teacher, {"logits": {}})
    # one that stays as it is does nothing, or it shows
    try_model(teacher)
    nn.init.ones_(teacher.lm_head.up.weight)
    with pytest.raises(UserError, match="logits are not its last layer's weight and bias times"):
        try_model(teacher)


@pytest.mark.parametrize(
    "change", [lambda layer: layer, Replaced, nn.utils.parametrizations.weight_norm]
)
def test_a_last_layer_whose_weight_learns_is_taken(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    student = with_last_layer(change)
    teacher = with_last_layer(lambda layer: layer).requires_grad_(False)
    nn.init.normal_(teacher.lm_head.weight)
    with Distiller(student, teacher, {"logits": {}}) as distiller:
        distiller(BATCH)[0].backward()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert trained and all(p.grad is not None and bool(p.grad.any()) for p in trained)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_student_has_its_teachers_head(name: str) -> None:
    head = "masked_lm" if name == "bert" else "causal_lm"
    teacher = model_with(name, f"AutoModelFor{'MaskedLM' if name == 'bert' else 'CausalLM'}")
    layers = make_layer_map("uniform", 2, 4)
    student, start = build_student(teacher, Student(layers=2, head=head), layers)
    assert type(student) is type(teacher)
    assert start.copied == start.total
    assert torch.equal(
        student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    )


def test_causal_labels_are_the_next_tokens_that_are_no_padding() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = target_labels({"input_ids": ids, "attention_mask": mask}, "causal_lm")
    assert labels is not None
    expected = [[6, 7, 8, IGNORE_INDEX], [10, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]
    assert labels.tolist() == expected
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert count_divisors(inputs, True, "valid", labels)[4] == 4
    assert target_labels({"input_ids": ids}, "masked_lm") is None


def classified(outputs: int, **losses: Any) -> Objective:
    pair = ModelPair((4, 4), head="sequence_classification", outputs=outputs)
    return Objective(Losses.model_validate(losses), make_layer_map("final", 1, 1), pair)


def test_scores_are_distilled_and_learned_by_squared_error() -> None:
    made = classified(1, logits={"kind": "mse", "weight": 3.0}, labels={})
    own, target = torch.randn(5, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    inputs = {"input_ids": torch.ones(5, 2), "labels": torch.rand(5)}
    capture_of = [type("Seen", (), {"logits": logits})() for logits in (own, target)]
    total, values = made(*capture_of, inputs, WHOLE.double())
    soft = (own - target).square().mean()
    hard = (own[:, 0] - inputs["labels"].double()).square().mean()
    torch.testing.assert_close(values[0], torch.stack([soft, hard]))
    torch.testing.assert_close(total, 3 * soft + hard)
    assert made.divisors(inputs).tolist()[3:5] == [5, 5]


def test_a_regression_has_no_probabilities() -> None:
    with pytest.raises(UserError, match="kind is kl, but the models' heads give one number"):
        classified(1, logits={})
