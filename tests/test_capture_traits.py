"""What trying a model shows is what it does, whatever its flags and settings say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from tiny_models import HEADS, VOCABULARY, WIDTH, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, FalconConfig, PreTrainedModel
from transformers.models.bert.modeling_bert import BertSelfAttention

from benchmarks.family_models import family_model
from fastkd.capture import (
    AttentionShape,
    capture,
    capture_keywords,
    find_blocks,
    route_attention,
    set_attention,
    try_model,
)
from fastkd.capture.routing import listening_function
from fastkd.errors import UserError
from fastkd.models.poolers import drop_pooler

TOKENS = 20
EVERY = (1, 2, 3, 4)


def tried(family: str, attention: str = "sdpa", **changes: Any) -> Any:
    model = family_model(family, **changes).requires_grad_(False)
    set_attention(model, attention)
    return try_model(model, TOKENS)


@pytest.mark.parametrize(
    ("family", "changes", "causal", "windows"),
    [
        # causal, though no module says so
        ("clip_text_model", {}, True, {}),
        ("doge", {}, True, dict.fromkeys(EVERY, 6)),
        # half the window to either side
        ("gemma3_text", {}, True, {layer: 6 for layer in range(1, 5)}),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            False,
            dict.fromkeys((1, 2, 3, 4), 4),
        ),
        ("modernbert", {}, False, {2: 3, 3: 3}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, True, {3: 6, 4: 6}),
        ("qwen2", {}, True, {}),
        ("bert", {}, False, {}),
        ("bert", {"is_decoder": True}, True, {}),
    ],
)
def test_what_queries_see(
    family: str, changes: dict[str, Any], causal: bool, windows: dict[int, int]
) -> None:
    traits = tried(family, **changes)
    assert (traits.causal, dict(traits.windows)) == (causal, windows)
    assert traits.unknown is None and traits.differs is None


def test_windows_are_those_of_the_sequences_that_are_read() -> None:
    model = family_model("mistral")
    assert dict(try_model(model, 5).windows) == {}
    assert dict(try_model(model, 8).windows) == dict.fromkeys(EVERY, 6)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "vaultgemma", "granite_swa"])
def test_soft_caps_and_sinks_are_captured(family: str) -> None:
    model = family_model(family)
    try:
        set_attention(model, "sdpa")
    except UserError as error:
        assert re.search(r"can't run attention 'sdpa' here .*try attention: eager", str(error))
    else:
        # transformers 5.17 lets it run without its caps
        assert try_model(model, TOKENS).differs is not None
    set_attention(model, "eager")
    assert try_model(model, TOKENS).differs is None
    with torch.no_grad(), capture(model, attention=[1]) as states:
        model(input_ids=tiny_batch()["input_ids"], **capture_keywords(model))
    state = states.attention[1]
    assert (state.softcap is not None) == ("gemma" in family)
    assert (state.sinks is not None) == ("gemma" not in family)


def test_probabilities_that_are_not_the_captured_ones_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gemma 2 as it was read before: its scores without their cap."""
    from fastkd.capture import routing

    state = routing._state

    def uncapped(*arguments: Any) -> Any:
        return state(*arguments)._replace(softcap=None)

    monkeypatch.setattr(routing, "_state", uncapped)
    traits = tried("gemma2", "eager", attn_logit_softcapping=1.0)
    assert "Gemma2Model: the attention of layers [1, 2, 3, 4] is not the softmax" in traits.differs


def test_what_is_added_to_scores_is_named() -> None:
    assert "as it adds position_bias" in tried("inkling_text").differs


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        # added to the mask, by the values of a layer; a table of relative positions
        ("doge", {}),
        ("beit", {"use_relative_position_bias": True}),
        ("beit", {"use_shared_relative_position_bias": True}),
    ],
)
def test_what_is_added_to_scores_once_it_has_learned_is_told_of_what_trains(
    family: str, changes: dict[str, Any]
) -> None:
    model = family_model(family, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    differs = try_model(model, TOKENS).differs
    assert differs is not None
    assert "is not the softmax" in differs and "as soon as parameters that are 0 now" in differs
    assert torch.equal(torch.get_rng_state(), drawn)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # as it is, and stays where it is frozen
    assert try_model(model.requires_grad_(False), TOKENS).differs is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert", "qwen2"])
def test_biases_that_are_0_make_no_difference(name: str) -> None:
    model = tiny_model(name)
    assert name == "modernbert" or any(not parameter.any() for parameter in model.parameters())
    assert try_model(model, TOKENS).differs is None


def test_parameters_are_put_back_after_an_error() -> None:
    model = tiny_model("bert")
    bias, seen = model.encoder.layer[0].attention.self.query.bias, []

    def fail(*_: object) -> None:
        seen.append(bool(bias.any()))
        if seen[-1]:
            raise UserError("no")

    model.embeddings.register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="no"):
        try_model(model)
    assert seen[-1] and not bias.any()


def test_shapes_are_measured() -> None:
    traits = try_model(tiny_model("qwen3", head_dim=6))
    assert traits.shapes == (AttentionShape(HEADS, 2, 6, 6),)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("falcon", "FalconModel: its attention does not go through transformers' attention interf"),
        ("diffllama", r"layers \[1, 2, 3, 4\] attend more than once in a forward pass"),
        ("glm_moe_dsa", "layer 1 gives other states when its attention is captured"),
    ],
)
def test_attention_that_can_t_be_captured_is_refused_and_left_as_it_came(
    family: str, message: str
) -> None:
    model = family_model(family)
    ids = {"input_ids": tiny_batch()["input_ids"]}
    with torch.no_grad():
        before = model(**ids, **capture_keywords(model)).last_hidden_state
    with pytest.raises(UserError, match=message) as refused:
        try_model(model, TOKENS)
    assert "leave losses.attention and losses.relations out" in str(refused.value)
    # what does not need attention goes on
    try_model(model, TOKENS, attention=False)
    with torch.no_grad():
        assert torch.equal(model(**ids, **capture_keywords(model)).last_hidden_state, before)


class Inheriting(BertSelfAttention):
    """An attention class of another module than its eager function."""


class Calling(BertSelfAttention):
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return super().forward(*arguments, **keywords)


@pytest.mark.parametrize("kind", [Inheriting, Calling])
def test_attention_that_is_subclassed_elsewhere_runs_its_own_eager_function(kind: type) -> None:
    model = tiny_model("bert")
    set_attention(model, "eager")
    ids = {"input_ids": tiny_batch()["input_ids"]}
    with torch.no_grad():
        before = model(**ids).last_hidden_state
    for block in find_blocks(model):
        block.attention.self.__class__ = kind
    assert try_model(model, TOKENS).differs is None
    with torch.no_grad(), capture(model, attention=[1]) as states:
        assert torch.equal(model(**ids).last_hidden_state, before)
    assert states.attention[1].query.shape[1] == HEADS


def test_attention_without_an_eager_function_is_refused() -> None:
    attend, state = listening_function("eager"), torch.ones(1, 2, 3, 4)
    with pytest.raises(UserError, match="Linear has no eager_attention_forward beside its forward"):
        attend(nn.Linear(4, 4), state, state, state, None)


def test_composite_models_are_refused_by_their_parts() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=small, vision_config=small, projection_dim=8))
    expected = r"CLIPModel is made of several models \((text|vision)_config, .*give one of its mod"
    with pytest.raises(UserError, match=expected):
        try_model(model, TOKENS, attention=False, hidden=False)
    with pytest.raises(UserError, match=expected):
        find_blocks(model)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_what_a_block_holds_is_no_stack_of_blocks(layers: int) -> None:
    """MobileBERT's blocks hold three small networks each."""
    model = family_model("mobilebert", num_hidden_layers=layers)
    assert [type(block).__name__ for block in find_blocks(model)] == ["MobileBertLayer"] * layers


@pytest.mark.parametrize("family", ["bert", "albert", "layoutlm", "squeezebert"])
def test_models_run_without_their_pooler(family: str) -> None:
    """Whether they ask for it or call it anyway."""
    model = family_model(family)
    ids = {"input_ids": tiny_batch()["input_ids"]}
    before = model(**ids)
    drop_pooler(model)
    after = model(**ids)
    assert before.pooler_output is not None and after.pooler_output is None
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)


def test_attention_of_a_model_that_was_not_routed_is_not_captured() -> None:
    with (
        pytest.raises(UserError, match=r"was not routed.*call route_attention\(model\) first"),
        capture(tiny_model("bert"), attention=[1]),
    ):
        pass


def earlier_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        state: Tensor = model(input_ids=ids, **capture_keywords(model)).last_hidden_state[:, :-1]
    return state


def test_a_model_to_tune_keeps_its_own_masks() -> None:
    """Routed, Falcon loses its causal mask: later tokens change earlier states."""
    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS
    )
    model = transformers.FalconModel(config).eval()
    ids = tiny_batch((12, 12))["input_ids"]
    other = ids.clone()
    other[:, -1] = 6 + (ids[:, -1] == 6)
    set_attention(model, "sdpa")
    assert torch.equal(earlier_states(model, ids), earlier_states(model, other))
    with pytest.raises(UserError, match="does not go through"):
        route_attention(model)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model_given_labels_makes_its_own_loss_under_capture(name: str) -> None:
    torch.manual_seed(0)
    config = tiny_model(name).config
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    route_attention(model, "sdpa")
    ids = tiny_batch((12, 12))["input_ids"]
    read = {"input_ids": ids, **capture_keywords(model)}
    expected = model(**read, labels=ids)
    with capture(model, attention=[1], logits=True) as states:
        given = model(**read, labels=ids)
        assert torch.equal(given.loss, expected.loss)
        assert torch.equal(given.logits, expected.logits)
    assert states.logits is not None
    # without labels they are left out, as ever
    with capture(model):
        assert model(**read).logits.shape[-1] == 0
