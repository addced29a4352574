"""Masks for masked language modelling: BERT's shares, one draw a token, however a step is cut."""

import math

import pytest
import torch
from tiny_models import VOCABULARY, tiny_tokenizer

from fastkd.data.text.mlm import Masking
from fastkd.errors import UserError
from fastkd.types import IGNORE_INDEX

MASK = 4
ROWS, TOKENS = 512, 62


def blocks(rows: int = ROWS, tokens: int = TOKENS) -> torch.Tensor:
    """Random text between two special tokens."""
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 2, 3
    return ids


def masking(seed: int = 1, probability: float = 0.15) -> Masking:
    return Masking(tiny_tokenizer(), probability, seed)


def chosen(ids: torch.Tensor, draw: int, seed: int = 1, first: int = 0) -> torch.Tensor:
    return masking(seed)(ids, draw, first)["labels"][:, 1:-1] != IGNORE_INDEX


def within(count: int, of: int, share: float) -> None:
    """Within four standard deviations of a binomial count."""
    assert abs(count - of * share) < 4 * math.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("probability", [0.15, 0.4, 1.0])
def test_shares_are_berts(probability: float) -> None:
    ids = blocks()
    before = ids.clone()
    made = masking(probability=probability)(ids, 7)
    assert torch.equal(ids, before)
    hit = made["labels"] != IGNORE_INDEX
    assert not hit[:, 0].any() and not hit[:, -1].any()
    assert torch.equal(made["labels"][hit], ids[hit])
    assert torch.equal(made["input_ids"][~hit], ids[~hit])
    count = int(hit.sum())
    if probability < 1:
        within(count, ROWS * (TOKENS - 2), probability)
    else:
        assert count == ROWS * (TOKENS - 2)
    became, was = made["input_ids"][hit], ids[hit]
    within(int((became == MASK).sum()), count, 0.8 + 0.1 / VOCABULARY)
    within(int((became == was).sum()), count, 0.1 + 0.1 / VOCABULARY)
    # a tenth goes to any token of the vocabulary, as often to each
    swapped = became[(became != MASK) & (became != was)]
    counts = torch.bincount(swapped, minlength=VOCABULARY).double()
    assert len(counts) == VOCABULARY and (counts[:MASK] > 0).all()
    expected = count * 0.1 / VOCABULARY
    assert float(((counts - expected) ** 2 / expected).sum()) < 2 * VOCABULARY


@pytest.mark.parametrize("tokens", [1, 7, 62, 64])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_masking_the_whole_and_cutting_is_masking_the_cut(tokens: int, size: int) -> None:
    ids = torch.randint(5, VOCABULARY, (80, tokens), generator=torch.Generator().manual_seed(1))
    whole = masking(probability=0.5)(ids, 3)
    for first in range(0, len(ids), size):
        part = masking(probability=0.5)(ids[first : first + size], 3, first)
        for name, value in part.items():
            assert torch.equal(value, whole[name][first : first + size])


def test_rows_steps_and_seeds_are_drawn_apart() -> None:
    ids = blocks()
    one = chosen(ids, 7)
    assert torch.equal(chosen(ids, 7), one)
    drawn = one.numel()
    others = [
        chosen(ids, 8),
        chosen(ids, 7, seed=2),
        chosen(ids, 7, first=ROWS),
        # neighbouring rows, and neighbouring tokens
        one.roll(1, dims=0),
        one.roll(1, dims=1),
    ]
    for other in others:
        within(int((one & other).sum()), drawn, 0.15**2)
    # what was held out is drawn apart from every step
    held = masking()(ids, "heldout")["labels"][:, 1:-1] != IGNORE_INDEX
    within(int((one & held).sum()), drawn, 0.15**2)


def test_masking_needs_a_mask_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="the teacher's tokenizer has no mask token"):
        Masking(tokenizer, 0.15, 0)
