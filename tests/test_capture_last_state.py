"""What is captured as a model's outputs are the states that it hands on, by whichever module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, WIDTH, tiny_batch, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from benchmarks.family_models import family_model
from fastkd import Distiller
from fastkd.capture import capture, capture_keywords, try_model
from fastkd.capture.facts import hands_on_last_block
from fastkd.capture.lm_head import last_hidden_state
from fastkd.capture.trial_inputs import trial_inputs
from fastkd.errors import UserError

BATCH = tiny_batch()
POOLED = {"embedding_output": {"pooling": "mean"}}


def bart(seed: int) -> PreTrainedModel:
    """A decoder whose head calls what its base model wraps, and not that."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        init_std=0.2,
        dropout=0.0,
        pad_token_id=0,
    )
    return BartForCausalLM(config).eval()


def classifier(seed: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(tiny_config("bert", **rates, **changes)).eval()


def randomise_norms(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 2)


def outputs_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), capture(model, outputs=True) as states:
        model(**inputs, **capture_keywords(model))
    assert states.outputs is not None
    return states.outputs


def test_a_final_norm_above_the_base_model_is_not_left_out() -> None:
    """DINOv3's model without a head calls its encoder, its base model, and then its norm."""
    model = family_model("dinov3_vit")
    randomise_norms(model)
    inputs = trial_inputs(model, 4)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    assert torch.equal(outputs_of(model, inputs), expected)
    with torch.no_grad():
        assert torch.equal(last_hidden_state(model, model, inputs), expected)
    assert not hands_on_last_block(model)


def test_a_head_that_passes_its_base_model_by_hands_its_states_on() -> None:
    student, teacher = bart(0), bart(1).requires_grad_(False)
    try_model(student, outputs=True)
    pooled = []
    mask = BATCH["attention_mask"].unsqueeze(-1).float()
    for model in (student, teacher):
        with torch.no_grad():
            expected = model.model.decoder(**BATCH, use_cache=False).last_hidden_state
            assert torch.equal(outputs_of(model, BATCH), expected)
            assert torch.equal(last_hidden_state(model, model, {**BATCH}), expected)
        pooled.append((expected * mask).sum(1) / mask.sum(1))
    with Distiller(student, teacher, POOLED) as distiller:
        parts = distiller(BATCH)[1]
    expected = 1 - nn.functional.cosine_similarity(*pooled).mean()
    torch.testing.assert_close(parts["embedding_output"], expected)


@pytest.mark.parametrize("losses", [POOLED, {"logits": {}}, {"hidden": {}, "attention": {}}])
def test_models_that_are_configured_to_give_tuples_give_the_same(losses: dict[str, Any]) -> None:
    found = []
    for tuples in (False, True):
        models = [classifier(seed, return_dict=not tuples) for seed in (0, 1)]
        with Distiller(models[0], models[1].requires_grad_(False), losses) as distiller:
            found.append(distiller(BATCH)[1])
        headless = tiny_model("bert", return_dict=not tuples)
        found[-1]["outputs"] = outputs_of(headless, BATCH)
        with torch.no_grad(), capture(headless, outputs=True) as states:
            headless(**BATCH)
        assert torch.equal(states.outputs, found[-1]["outputs"])
    assert found[0].keys() == found[1].keys() and len(found[0]) > 1
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_tuple_of_no_one_knows_what_is_refused() -> None:
    model = classifier(0)
    message = "BertForSequenceClassification gives a tuple.*call it with return_dict=True"
    with torch.no_grad(), pytest.raises(UserError, match=message), capture(model, outputs=True):
        model(**BATCH, return_dict=False)


class Pooled(BertModel):
    def forward(self, *arguments: Any, **keywords: Any) -> ModelOutput:
        return ModelOutput(pooler_output=super().forward(*arguments, **keywords).pooler_output)


class Twice(BertForSequenceClassification):
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.bert(*arguments, **keywords)
        return super().forward(*arguments, **keywords)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Pooled, r"Pooled hands on no last_hidden_state, expected \[batch, tokens, width\]"),
        (Twice, "the base model runs more than once in a forward pass"),
    ],
)
def test_a_model_without_one_last_state_is_refused_before_a_run(
    kind: type[PreTrainedModel], message: str
) -> None:
    model = kind(tiny_config("bert")).eval()
    with pytest.raises(UserError, match=message):
        try_model(model, attention=False, hidden=False, outputs=True)
    with pytest.raises(UserError, match=message):
        Distiller(model, kind(tiny_config("bert")).requires_grad_(False), POOLED)
    # what does not read it goes on
    try_model(model, attention=False, hidden=False)
