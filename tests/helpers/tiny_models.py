"""Tiny random models of every architecture that fastkd is tried on, and folders that hold them.

Weights are drawn wide enough that attention is far from uniform: a test that compares attention
would pass on anything otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

VOCABULARY = 64
LAYERS, WIDTH, HEADS, KV_HEADS, INTERMEDIATE, POSITIONS = 4, 32, 4, 2, 48, 64
# how far a local layer of the tiny ModernBERT sees, in either direction
WINDOW = 2


@dataclass(frozen=True)
class Architecture:
    """How one family of transformers spells a small configuration."""

    config: type[PreTrainedConfig]
    feed_forward: str
    causal: bool
    extra: dict[str, Any]


_ROTARY = {"num_key_value_heads": KV_HEADS, "max_position_embeddings": POSITIONS}
ARCHITECTURES = {
    "bert": Architecture(
        BertConfig, "intermediate_size", False, {"max_position_embeddings": POSITIONS}
    ),
    # RoBERTa counts positions from the padding id on
    "roberta": Architecture(
        RobertaConfig,
        "intermediate_size",
        False,
        {"max_position_embeddings": POSITIONS + 1, "type_vocab_size": 1},
    ),
    "distilbert": Architecture(
        DistilBertConfig, "hidden_dim", False, {"max_position_embeddings": POSITIONS}
    ),
    "gpt2": Architecture(GPT2Config, "n_inner", True, {"n_positions": POSITIONS}),
    "llama": Architecture(LlamaConfig, "intermediate_size", True, _ROTARY),
    "qwen2": Architecture(Qwen2Config, "intermediate_size", True, _ROTARY),
    "qwen3": Architecture(
        Qwen3Config, "intermediate_size", True, {**_ROTARY, "head_dim": WIDTH // HEADS}
    ),
    "modernbert": Architecture(
        ModernBertConfig,
        "intermediate_size",
        False,
        {"max_position_embeddings": POSITIONS, "local_attention": 2 * WINDOW},
    ),
}
NAMES = tuple(ARCHITECTURES)
CAUSAL = tuple(name for name in NAMES if ARCHITECTURES[name].causal)


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model: 4 blocks, 4 heads, 32 wide; `changes` in its own names."""
    architecture = ARCHITECTURES[name]
    settings = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        architecture.feed_forward: INTERMEDIATE,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        **({"cls_token_id": 2, "sep_token_id": 3} if name == "modernbert" else {}),
        **architecture.extra,
    }
    return architecture.config(**{**settings, **changes})


def tiny_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in eval mode, with its pooler where the architecture has one."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModel.from_config(tiny_config(name, **changes))
    return model.eval()


def tiny_batch(lengths: Iterable[int] = (12, 7, 3), seed: int = 0) -> dict[str, Tensor]:
    """Random ids with padding on the right: `input_ids` and `attention_mask` [batch, tokens]."""
    valid = list(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (len(valid), max(valid)), generator=generator)
    mask = torch.arange(max(valid)) < torch.tensor(valid)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def tiny_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer of the words `w5`, `w6`, ... framed as BERT frames its inputs."""
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    words = {f"w{index}": index for index in range(len(special), size)}
    backend = Tokenizer(WordLevel({**special, **words}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def save_teacher(
    folder: Path, name: str = "bert", *, tokens: int = VOCABULARY, seed: int = 0, **changes: Any
) -> Path:
    """Write a tiny model and its tokenizer as a teacher's folder."""
    tiny_model(name, seed, **changes).save_pretrained(folder)
    tiny_tokenizer(tokens).save_pretrained(folder)
    return folder


def write_text(path: Path, documents: int = 40, words: int = 30, seed: int = 0) -> Path:
    """Write documents of random words that the tiny tokenizer knows, one a paragraph."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (documents, words), generator=generator).tolist()
    path.write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in ids), encoding="utf-8")
    return path
