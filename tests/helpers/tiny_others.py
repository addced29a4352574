"""Models that read the words of `tiny_models` by a tokenizer of their own: letter by letter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_config
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

LETTERS = 16


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of `w` and digits, without a frame; `w12 w5` is five tokens."""
    words = ["[UNK]", "[PAD]", "w", *map(str, range(10)), "x", "y", "z"]
    assert len(words) == LETTERS
    table = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(WordLevel(table, unk_token="[UNK]"))
    backend.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex("."), "isolated")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def save_other(
    folder: Path, name: str = "distilbert", *, scores: bool = False, **changes: Any
) -> Path:
    """Write a narrower model of two blocks and its own tokenizer."""
    given = {
        "vocab_size": LETTERS,
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "pad_token_id": 1,
        "initializer_range": 0.1,
        **({"num_labels": 1} if scores else {}),
        **changes,
    }
    torch.manual_seed(3)
    kind = AutoModelForSequenceClassification if scores else AutoModel
    kind.from_config(tiny_config(name, **given)).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder
