"""Divergences as a mean of the means of sequences: a loss of MiniLMv2's own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastkd_kernels import AttentionState
from test_recipe import refusal, tree
from torch import Tensor

from fastkd.capture import Capture
from fastkd.layer_map import make_layer_map
from fastkd.losses import DIVISORS, ModelPair
from fastkd.losses.objective import Objective
from fastkd.recipe import Losses

HEADS, TOKENS, SIZE = 2, 9, 4
LENGTHS = (9, 5)
MASK = torch.tensor([[position < length for position in range(TOKENS)] for length in LENGTHS])
SECTIONS: dict[str, dict[str, Any]] = {
    "attention": {"kind": "kl"},
    "relations": {"relations": ["qk"], "relation_heads": HEADS},
}


def attention(seed: int) -> AttentionState:
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(2, HEADS, TOKENS, SIZE, generator=generator, dtype=torch.float64)
        for _ in range(3)
    ]
    return AttentionState(*drawn, SIZE**-0.5)


STUDENT, TEACHER = attention(1), attention(2)


def cut(state: AttentionState, rows: slice) -> AttentionState:
    values = state.value
    assert values is not None
    return AttentionState(state.query[rows], state.key[rows], values[rows], state.scale)


def value(section: str, mean_over: str, rows: slice = slice(None)) -> Tensor:
    """What some sequences add to the loss of both."""
    losses = Losses.model_validate({section: {**SECTIONS[section], "mean_over": mean_over}})
    pair = ModelPair((8, 8), heads=(HEADS, HEADS))
    made = Objective(losses, make_layer_map([2, 0], 2, 4), pair)
    ids = torch.ones(2, TOKENS, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": MASK.long()}
    part = {name: tensor[rows] for name, tensor in inputs.items()}
    shares = made.divisors(part) / made.divisors(inputs).clamp(min=1)
    assert shares.shape == (len(DIVISORS),)
    states = (
        Capture(attention={layer: cut(state, rows)})
        for layer, state in ((1, STUDENT), (2, TEACHER))
    )
    return made(*states, part, shares)[1][0, 0]


def divergence(sequence: int) -> Tensor:
    """KL of one sequence's attention from its definition: a mean over its heads and tokens."""
    length = LENGTHS[sequence]
    logs = [
        torch.log_softmax(
            state.query[sequence, :, :length]
            @ state.key[sequence, :, :length].transpose(-1, -2)
            * SIZE**-0.5,
            dim=-1,
        )
        for state in (TEACHER, STUDENT)
    ]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).mean()


@pytest.mark.parametrize("section", SECTIONS)
def test_both_means_are_as_defined(section: str) -> None:
    first, second = divergence(0), divergence(1)
    tokens = (LENGTHS[0] * first + LENGTHS[1] * second) / sum(LENGTHS)
    torch.testing.assert_close(value(section, "tokens"), tokens, rtol=1e-12, atol=0)
    sequences = (first + second) / 2
    torch.testing.assert_close(value(section, "sequences"), sequences, rtol=1e-12, atol=0)
    assert abs(tokens - sequences) > 0.01 * tokens


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("mean_over", ["tokens", "sequences"])
def test_cutting_the_batch_changes_nothing(section: str, mean_over: str) -> None:
    parts = [value(section, mean_over, slice(row, row + 1)) for row in range(2)]
    whole = value(section, mean_over)
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=0)


def test_scores_have_no_mean_over_sequences() -> None:
    losses = {"attention": {"mean_over": "sequences"}}
    assert "mean_over is sequences, but score_mse" in refusal(tree(losses=losses))
