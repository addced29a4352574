"""Attention made again from the hidden states below it is the attention of a whole pass."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from tiny_models import LAYERS, NAMES, VOCABULARY, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import AutoModel, GPTNeoXConfig, GptOssConfig, PreTrainedModel

from fastkd.capture import (
    Capture,
    capture,
    capture_keywords,
    find_blocks,
    route_attention,
    try_recomputing,
)
from fastkd.errors import UserError

BLOCKS = range(1, LAYERS + 1)
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
# attention beside the feed-forward layer; sinks, windows and experts
MORE: dict[str, Any] = {
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "gpt_oss": lambda: GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=4, sliding_window=4
    ),
}


def routed(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    if name in MORE:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModel.from_config(MORE[name]()).eval()
    else:
        model = tiny_model(name)
    model = model.to(dtype)
    route_attention(model)
    return model


def whole_pass(model: PreTrainedModel, batch: dict[str, Tensor]) -> Capture:
    with torch.no_grad(), capture(model, attention=BLOCKS, hidden=range(LAYERS + 1)) as states:
        model(**batch, **capture_keywords(model))
    return states


def without_padding(hidden: dict[int, Tensor], batch: dict[str, Tensor]) -> dict[int, Tensor]:
    return {n: state * batch["attention_mask"][..., None] for n, state in hidden.items()}


def assert_same_attention(
    model: PreTrainedModel, batch: dict[str, Tensor], layers: Collection[int]
) -> None:
    recomputed = try_recomputing(model, tiny_batch(), layers)
    states = whole_pass(model, batch)
    found = recomputed(batch, without_padding(states.hidden, batch), layers)
    valid = batch["attention_mask"].bool()
    assert sorted(found) == sorted(layers)
    for layer, state in found.items():
        expected = states.attention[layer]
        for ours, theirs in zip(state[:3], expected[:3], strict=True):
            assert torch.equal(ours.movedim(2, 1)[valid], theirs.movedim(2, 1)[valid]), layer
            assert ours.shape == theirs.shape and ours.isfinite().all()
        assert state[3:5] == expected[3:5]
        assert (state.sinks is None) == (expected.sinks is None)


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_attention_is_that_of_a_whole_pass(name: str) -> None:
    model = routed(name)
    before = [vars(block).copy() for block in find_blocks(model)]
    assert_same_attention(model, tiny_batch((9, 16), seed=1), BLOCKS)
    assert_same_attention(model, tiny_batch((5, 3, 8, 8), seed=2), (2, 4))
    assert [vars(block) for block in find_blocks(model)] == before


def test_half_precision_is_made_again_to_the_bit() -> None:
    assert_same_attention(routed("llama", torch.bfloat16), tiny_batch((9, 16), seed=1), BLOCKS)


def test_rounded_states_give_attention_within_their_bits() -> None:
    """|W h - W round(h)| <= 2^-9 |W| |h| of every number, for a norm that stands after blocks."""
    model, batch = routed("bert"), tiny_batch((9, 16), seed=1)
    states = whole_pass(model, batch)
    rounded = {n: state.bfloat16().float() for n, state in states.hidden.items()}
    found = try_recomputing(model, tiny_batch(), BLOCKS)(batch, rounded, BLOCKS)
    for layer, block in enumerate(find_blocks(model), start=1):
        projections = block.attention.self
        for name in ("query", "key", "value"):
            ours, theirs = (getattr(s[layer], name) for s in (found, states.attention))
            weight = getattr(projections, name).weight
            bound = states.hidden[layer - 1].abs() @ weight.abs().T
            error = (ours - theirs).abs().transpose(1, 2).flatten(2)
            assert (error <= 2**-9 * bound + 1e-6).all()
            # what is rounded shows
            assert (error > 2**-16 * bound).any()


def test_a_block_that_reads_more_than_the_state_below_it_is_refused() -> None:
    model = routed("llama")
    block = find_blocks(model)[2]

    def moved(_module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        return (args[0] + 0.01, *args[1:]), kwargs

    handle = block.register_forward_pre_hook(moved, with_kwargs=True)
    with pytest.raises(UserError, match=r"^LlamaModel: the queries and keys of layers \[3\] are"):
        try_recomputing(model, tiny_batch(), BLOCKS)
    # of the others it holds
    try_recomputing(model, tiny_batch(), (1, 2, 4))
    handle.remove()
    try_recomputing(model, tiny_batch(), BLOCKS)


def test_a_model_that_needs_its_blocks_is_refused() -> None:
    model = routed("bert")
    blocks = find_blocks(model)

    # what the second block gives is read by the third
    def hand_on(_module: nn.Module, _args: Any, output: Any) -> Any:
        return output, torch.ones(())

    def read(_module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        state, factor = args[0]
        return (state * factor, *args[1:]), kwargs

    blocks[1].register_forward_hook(hand_on)
    blocks[2].register_forward_pre_hook(read, with_kwargs=True)
    with pytest.raises(UserError, match=r"^BertModel does not run with its blocks left out \(Ty"):
        try_recomputing(model, tiny_batch(), BLOCKS)
    assert all("forward" not in vars(block) for block in blocks)
