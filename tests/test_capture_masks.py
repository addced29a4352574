"""Masks are made without a read, and hide what transformers' own hide."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor
from transformers import AutoModel, GptOssConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from fastkd.capture import reading, route_attention
from fastkd.capture.routing import hiding_nothing

TOKENS = 12
# shorter than a sequence
WINDOW = 4


def _with_sinks() -> Any:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=WINDOW,
    )
    return AutoModel.from_config(config).eval()


SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
DECODERS = {
    "llama": lambda: tiny_model("llama"),
    "gpt2": lambda: tiny_model("gpt2"),
    "windows": lambda: tiny_model("qwen2", **SLIDING),
    "windows and sinks": _with_sinks,
}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(5, VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(1))


# of sinks transformers has no sdpa
@pytest.mark.parametrize(
    ("decoder", "attention"),
    [*itertools.product(DECODERS, ["eager"]), *itertools.product([*DECODERS][:-1], ["sdpa"])],
)
def test_a_decoder_that_is_given_no_mask_sees_what_it_saw(
    decoder: str, attention: str, ids: Tensor
) -> None:
    model = DECODERS[decoder]()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).last_hidden_state
        route_attention(model)
        with reading(model, {"input_ids": ids}) as read:
            assert "attention_mask" in read
            given = model(**read).last_hidden_state
    assert torch.equal(given, expected)


def _mask(name: str, ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    make = ALL_MASK_ATTENTION_FUNCTIONS[name]
    batch, tokens = ids.shape
    return make(
        batch_size=batch,
        q_length=tokens,
        kv_length=tokens,
        attention_mask=attention_mask,
        mask_function=causal_mask_function,
        **kwargs,
    )


def test_a_mask_is_made_where_something_is_hidden(ids: Tensor) -> None:
    route_attention(tiny_model("llama"), "sdpa")
    padded = torch.ones_like(ids, dtype=torch.bool)
    padded[1, 7:] = False
    whole = hiding_nothing(ids)
    for none in (None, whole):
        assert _mask("fastkd-sdpa", ids, none) is None
        for further in ({"local_size": TOKENS}, {"allow_is_causal_skip": False}):
            made = _mask("fastkd-sdpa", ids, none, **further)
            assert torch.equal(made, _mask("sdpa", ids, None, **further))
    assert torch.equal(_mask("fastkd-sdpa", ids, padded), _mask("sdpa", ids, padded))
    # of a whole one that does not say so a mask is made, which hides the future alone
    made = _mask("fastkd-sdpa", ids, whole.clone(memory_format=torch.contiguous_format))
    assert torch.equal(made, torch.ones(TOKENS, TOKENS).tril().bool().expand_as(made))


@pytest.mark.parametrize("skip", ["allow_is_causal_skip", "allow_is_bidirectional_skip"])
def test_nothing_is_hidden_in_a_graph_either(
    skip: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    route_attention(tiny_model("llama"), "sdpa")
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda _tensor: True)
    assert _mask("fastkd-sdpa", ids, hiding_nothing(ids), **{skip: True}) is None
