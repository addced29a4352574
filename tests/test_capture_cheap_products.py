"""What depends on length is seen at full length, without the arithmetic of a whole pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from benchmarks.family_models import family_model
from fastkd.capture import set_attention, try_model
from fastkd.capture.cheap_products import CheapProducts
from fastkd.errors import UserError

TOKENS = 80
EVERY = (1, 2, 3, 4)


def wide(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    return LlamaModel(LlamaConfig(**sizes, **heads, **changes)).requires_grad_(False)


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("doge", {}),
    ("gemma3_text", {}),
    ("gpt2", {}),
    ("gpt_oss", {}),
    ("llama4_text", {}),
    ("mistral", {}),
    ("modernbert", {}),
    ("bloom", {}),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_length_shows_what_a_whole_trial_shows(
    family: str, changes: dict[str, Any], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for few in (20, 4):
        monkeypatch.setattr("fastkd.capture.trial._FEW", few)
        model = family_model(family, **changes).requires_grad_(False)
        try:
            set_attention(model, attention)
            traits = try_model(model, 20)
        except UserError as error:
            found.append(str(error))
            continue
        kept = traits.causal, dict(traits.windows), traits.shapes, traits.sinks
        found.append(
            (*kept, traits.unknown, traits.differs is None, model.config._attn_implementation)
        )
    assert found[0] == found[1]


@pytest.mark.parametrize(("tokens", "windows"), [(50, {}), (51, dict.fromkeys(EVERY, 50))])
def test_windows_far_beyond_the_few_tokens_are_seen(tokens: int, windows: dict[int, int]) -> None:
    model = family_model("mistral", sliding_window=50).requires_grad_(False)
    traits = try_model(model, tokens)
    assert (traits.causal, dict(traits.windows)) == (True, windows)
    assert traits.unknown is None and traits.differs is None


def test_a_model_that_attends_otherwise_behind_a_length_is_said_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sdpa = F.scaled_dot_product_attention

    def sharper(query: torch.Tensor, *rest: Any, **given: Any) -> torch.Tensor:
        return sdpa(query * (2 if query.shape[2] > 40 else 1), *rest, **given)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", sharper)
    model = family_model("mistral", sliding_window=50).requires_grad_(False)
    assert try_model(model, 40).differs is None
    assert "is not the softmax" in (try_model(model, TOKENS).differs or "")


class _Named(LlamaModel):
    """Hides the last tokens of long sequences, where its attention has the name that it knows."""

    def forward(self, *args: Any, **given: Any) -> Any:
        mask = given["attention_mask"].clone()
        if mask.shape[1] > 60 and self.config._attn_implementation == "sdpa":
            mask[:, :9] = 0
        return super().forward(*args, **{**given, "attention_mask": mask})


def test_masks_that_follow_the_name_of_the_attention_are_seen_at_full_length() -> None:
    config = wide().config
    model = _Named(config).requires_grad_(False)
    set_attention(model, "sdpa")
    assert try_model(model, 60).causal
    set_attention(model, "sdpa")
    with pytest.raises(UserError, match="gives other states when its attention is captured"):
        try_model(model, TOKENS)
    # left as it came
    assert model.config._attn_implementation == "sdpa"
    # one that nobody listens to is not routed
    try_model(model, TOKENS, attention=False)
    assert model.config._attn_implementation == "sdpa"


def test_positions_that_are_missing_behind_the_few_tokens_are_missed() -> None:
    model = tiny_model("gpt2").requires_grad_(False)
    model.config.n_positions = model.config.max_position_embeddings = 10_000
    model.wpe = nn.Embedding(60, model.config.hidden_size)
    try_model(model, 60, attention=False)
    with pytest.raises(UserError, match=r"can't read 61 tokens .*give a smaller data\.block_size"):
        try_model(model, 61, attention=False)


@pytest.mark.parametrize("needs", [{}, {"attention": False}], ids=["attention", "hidden"])
def test_a_long_trial_takes_little_arithmetic(needs: dict[str, bool]) -> None:
    model = wide()
    set_attention(model, "sdpa")
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model(input_ids=torch.ones(2, 512, dtype=torch.long), use_cache=False)
    with FlopCounterMode(display=False) as tried:
        try_model(model, 512, **needs)
    # two passes without most of their terms, and a few with all on 32 tokens
    assert tried.get_total_flops() < whole.get_total_flops()


def test_products_are_those_of_the_first_terms_unless_asked_for_all() -> None:
    left, right, bias = torch.randn(3, 5, 40), torch.randn(40, 6), torch.randn(6)
    with CheapProducts() as cheap:
        few = left @ right, F.linear(left, right.T, bias), torch.bmm(left, right.expand(3, 40, 6))
        with cheap.exact():
            torch.testing.assert_close(left @ right, (left[..., None] * right).sum(2))
    short = (left[..., :32, None] * right[:32]).sum(2)
    for made, expected in zip(few, (short, short + bias, short), strict=True):
        torch.testing.assert_close(made, expected)
    torch.testing.assert_close(few[0], short)
