"""Small tasks, tokenizers of real words and masked language models for the tests of tasks."""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_config
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from fastkd.data.augmentation import Augmentation
from fastkd.data.augmentation.augment import Augmented
from fastkd.data.augmentation.masked_lm import MaskedWords, whole_words
from fastkd.data.augmentation.synonyms import SynonymList
from fastkd.data.tasks import (
    Columns,
    EncodedExamples,
    Examples,
    Task,
)

GLUE_FOLDER = Path(
    os.environ.get("FASTKD_GLUE") or Path(__file__).parents[3] / "shared" / "data" / "glue"
)
needs_glue = pytest.mark.skipif(
    not GLUE_FOLDER.is_dir(), reason="no GLUE folder at FASTKD_GLUE or ../shared/data/glue"
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    *("the", "not", "dog", "cat", "bird", "horse", "fish", "house", "tree", "river", "stone"),
    *("red", "green", "blue", "small", "large", "old", "new", "runs", "sleeps", "jumps", "eats"),
    *("sees", "quick", "slow", "warm", "cold", "light", "dark", "road", "hill", "don", "doesn"),
    *("##s", "##ed", "##ing", "##fish", "t", "'", ".", ",", "5"),
)
SENTENCES = (
    "The dog runs.",
    "A small cat sleeps, the old bird jumps.",
    "Green fish don't see the quick horse",
    "dark",
    "warm light, cold stone, new road: 5 houses",
)
EXAMPLES = Examples("t", [(text,) for text in SENTENCES], np.arange(5, dtype=np.int64))
SYNONYMS = (
    "dog\tcat",
    "dog\tpuppy",
    "house\tTREE",
    "jumps\tdog",
    "red\t5",
    "eats\teats",
    "hill\ttree",
)
PAIRS = Task(name="pairs", columns=Columns(texts=("a", "b"), label="y"), labels=("no", "yes"))
SCORES = Task(name="scores", columns=Columns(texts=("a",), label="y"), bounds=(0.0, 5.0))


def word_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of a few English words, in lower case, framed as BERT's."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def masked_model(name: str = "bert", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random masked language model in eval mode."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForMaskedLM.from_config(tiny_config(name, **changes))
    return model.eval()


def write_lines(path: Path, *lines: str) -> Path:
    """Write lines, gzipped if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def encoded(lengths: Sequence[int], max_length: int = 64) -> EncodedExamples:
    """Examples of the given lengths; every token of an example is its number + 1."""
    return EncodedExamples(
        tokens=np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths),
        types=None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.arange(len(lengths), dtype=np.int64),
        pad_id=0,
        max_length=max_length,
        fingerprint="tiny",
    )


def augmented(
    examples: Examples, cache: Path, masked: MaskedWords | None = None, **fields: Any
) -> Augmented:
    """Augmented examples from a model that is at hand."""
    settings = Augmentation(**{"masked_model": "given" if masked else None, **fields})
    known = frozenset(whole_words(word_tokenizer()).values())
    near = SynonymList(Path(settings.synonyms), known) if settings.synonyms else None
    return Augmented(examples, settings, cache, masked, near, progress=False)


def texts_of(source: Augmented) -> list[tuple[str, ...]]:
    """Examples and copies without their labels."""
    return [example.texts for example in source]


def tuned_student(
    folder: Path, name: str, task: dict[str, Any], losses: dict[str, Any], **train: Any
) -> dict[str, Any]:
    """A recipe of three layers, drawn anew, that learn a task from the teacher tuned there."""
    return {
        "teacher": {"model": str(folder / "teacher" / "student")},
        "student": {"layers": 3, "init": "random"},
        "losses": losses,
        "task": task,
        "train": {"batch_size": 16, "log_every": 1, **train},
        "run": {"output": str(folder / name)},
    }
