"""Models that can't be captured are refused by name, with what to do."""

from __future__ import annotations

import copy

import pytest
from tiny_models import (
    ARCHITECTURES,
    HEADS,
    LAYERS,
    NAMES,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    tiny_model,
)
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import is_flash_attn_2_available

from fastkd.capture import (
    AttentionTraits,
    capture_keywords,
    find_blocks,
    route_attention,
    try_model,
)
from fastkd.errors import UserError


def routed(model: PreTrainedModel, implementation: str = "sdpa") -> PreTrainedModel:
    """A copy of a model that runs through the listener."""
    model = copy.deepcopy(model)
    route_attention(model, implementation)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_causality_is_read_from_what_attention_is_given(name: str) -> None:
    assert try_model(tiny_model(name)).causal is ARCHITECTURES[name].causal


@pytest.mark.parametrize("name", NAMES)
def test_every_tiny_model_is_capturable(name: str) -> None:
    try_model(routed(tiny_model(name)), POSITIONS)


@pytest.mark.parametrize("pad", [None, 0, VOCABULARY - 1])
def test_the_trial_reads_a_token_that_exists_and_is_no_padding(pad: int | None) -> None:
    try_model(routed(tiny_model("llama", pad_token_id=pad)))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_longer_than_the_positions_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"Model.* {POSITIONS + 1}.*smaller") as refused:
        try_model(routed(tiny_model(name)), POSITIONS + 1)
    assert "data.block_size" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed here")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_implementation_that_is_not_installed_is_refused(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(UserError, match=r"flash_attention_2.*try attention: sdpa"):
        route_attention(model, "flash_attention_2")
    route_attention(model, "sdpa")
    try_model(model)


class OwnAttention(nn.Module):
    """A block that computes attention by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.project(hidden).chunk(3, dim=-1)
        return hidden + (query @ key.mT).softmax(-1) @ value


class OwnConfig(PreTrainedConfig):
    model_type = "own"
    hidden_size = WIDTH


class OwnModel(PreTrainedModel):
    """A model whose attention bypasses transformers' attention interface."""

    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(OwnAttention(WIDTH) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return BaseModelOutput(last_hidden_state=hidden)


def test_attention_outside_the_interface_is_refused_by_name() -> None:
    model = OwnModel(OwnConfig(num_hidden_layers=2))
    with pytest.raises(UserError, match=r"OwnModel.*interface.*leave losses.attention"):
        try_model(model)
    # a run without losses of attention does not need it
    assert try_model(model, attention=False) == AttentionTraits()


@pytest.mark.parametrize("decoder_layers", [2, 3], ids=["equal-depths", "unequal-depths"])
def test_encoder_decoders_are_refused_by_name(decoder_layers: int) -> None:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=decoder_layers,
        num_heads=HEADS,
    )
    with pytest.raises(UserError, match=r"T5Model is an encoder-decoder.*single stack"):
        find_blocks(AutoModel.from_config(config))


def test_a_model_without_a_stack_of_blocks_is_refused() -> None:
    model = tiny_model("bert")
    model.config.num_hidden_layers = LAYERS + 1
    with pytest.raises(UserError, match=rf"BertModel: found 0 stacks of {LAYERS + 1} blocks"):
        find_blocks(model)


@pytest.mark.parametrize(
    ("config", "expected"),
    [(GPT2Config(), {"use_cache": False}), (BertConfig(use_cache=False), {})],
)
def test_no_cache_only_where_there_would_be_one(
    config: PreTrainedConfig, expected: dict[str, bool]
) -> None:
    model = nn.Module()
    model.config = config
    assert capture_keywords(model) == expected  # type: ignore[arg-type]


def test_blocks_that_were_replaced_are_found_again() -> None:
    model = tiny_model("bert")
    first = find_blocks(model)
    assert find_blocks(model) is first
    model.encoder.layer = nn.ModuleList(list(first))
    assert find_blocks(model) is model.encoder.layer
    model.encoder.layer = model.encoder.layer[:2]
    with pytest.raises(UserError, match="found 0 stacks of 4 blocks"):
        find_blocks(model)
    model.config.num_hidden_layers = 2
    assert find_blocks(model) is model.encoder.layer
