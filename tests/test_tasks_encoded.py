"""Tokenised examples are what the tokenizer makes of them, and are made once."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_config
from tiny_tasks import SENTENCES, WORDS, word_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastkd.data.sequences import name_token_types, token_dtype, uses_token_types
from fastkd.data.tasks import (
    EncodedExamples,
    Examples,
    encode_examples,
)
from fastkd.data.tasks import (
    tokenized as encoded,
)
from fastkd.data.tasks.questions import QuestionForm, Questions
from fastkd.errors import UserError

SINGLE = Examples("single", [(text,) for text in SENTENCES], np.arange(5, dtype=np.int64))
PAIRS = Examples(
    "pairs", list(zip(SENTENCES, reversed(SENTENCES), strict=True)), np.ones(5, dtype=np.int64)
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def encode(
    examples: Examples, tokenizer: PreTrainedTokenizerFast, cache: Path, **changes: Any
) -> EncodedExamples:
    options = {"max_length": 64, "token_types": False, "cache": cache, "progress": False}
    return encode_examples(examples, tokenizer, **{**options, **changes})


def elsewhere(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which fails in this process."""
    here = os.getpid()

    def call(*given: Any) -> Any:
        assert os.getpid() != here
        return function(*given)

    return call


@pytest.mark.parametrize("examples", [SINGLE, PAIRS], ids=["single", "pairs"])
@pytest.mark.parametrize("way", ["at once", "one by one", "in processes"])
def test_a_batch_is_what_the_tokenizer_makes(
    examples: Examples,
    way: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way != "at once":
        monkeypatch.setattr("fastkd.data.text.tokenize.BATCH_CHARACTERS", 1)
    if way == "in processes":
        monkeypatch.setattr("fastkd.data.text.tokenize.SMALL_BATCHES", 1)
        monkeypatch.setattr(encoded, "_tokenised", elsewhere(encoded._tokenised))
    made = encode(examples, tokenizer, tmp_path, token_types=True)
    assert len(made) == 5
    batch = made.batch(range(5), multiple=1)
    texts = [list(column) for column in zip(*examples.texts, strict=True)]
    expected = tokenizer(*texts, padding=True, return_tensors="pt", return_token_type_ids=True)
    assert batch.keys() == {*expected, "labels"}
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
    assert (batch["token_type_ids"].sum() > 0) == (examples is PAIRS)
    assert batch["labels"].tolist() == examples.labels.tolist()
    assert made.lengths.tolist() == expected["attention_mask"].sum(1).tolist()


def test_ids_are_stored_in_a_type_that_holds_the_largest() -> None:
    for largest, dtype in ((65535, np.uint16), (65536, np.int32)):
        table = {"[UNK]": 0, "last": largest}
        backend = Tokenizer(WordLevel(table, unk_token="[UNK]"))
        assert token_dtype(PreTrainedTokenizerFast(tokenizer_object=backend)) is dtype


def test_scores_keep_their_fractions(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    scores = np.asarray([0, 1.25, 2.75, 3.8, 5], dtype=np.float32)
    batch = encode(replace(SINGLE, labels=scores), tokenizer, tmp_path).batch([3, 1])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == scores[[3, 1]].tolist()


def test_long_examples_are_cut_and_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = max(encode(PAIRS, tokenizer, tmp_path).lengths)
    with caplog.at_level(logging.WARNING):
        made = encode(PAIRS, tokenizer, tmp_path, max_length=int(long) - 1)
    count = int((encode(PAIRS, tokenizer, tmp_path).lengths > long - 1).sum())
    assert f"{count} of 5 examples are longer than {long - 1} tokens and were cut" in caplog.text
    assert made.lengths.max() == long - 1
    assert made.batch([int(made.lengths.argmax())], 8)["input_ids"].shape == (1, long - 1)
    texts = [list(column) for column in zip(*PAIRS.texts, strict=True)]
    expected = tokenizer(*texts, truncation=True, max_length=int(long) - 1)["input_ids"]
    for row in range(5):
        assert made.batch([row], 1)["input_ids"][0].tolist() == expected[row]
    # a tokenizer that is saved later shall not cut
    encode(PAIRS, tokenizer, tmp_path / "other", max_length=int(long) - 1)
    assert tokenizer.backend_tokenizer.truncation is None


def test_second_run_reads_the_cache(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(PAIRS, tokenizer, tmp_path, token_types=True)

    def never(*_: object) -> None:
        raise AssertionError("examples were tokenised again")

    monkeypatch.setattr(encoded, "tokenise", never)
    again = encode(PAIRS, tokenizer, tmp_path, token_types=True, build=False)
    assert again.fingerprint == first.fingerprint
    for name, value in first.batch(range(5)).items():
        assert torch.equal(again.batch(range(5))[name], value)
    assert isinstance(again.tokens, np.memmap)


def test_whatever_changes_the_tokens_makes_a_new_cache(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def key(examples: Any = PAIRS, **changes: Any) -> str:
        return encode(
            examples, changes.pop("tokenizer", tokenizer), tmp_path, **changes
        ).fingerprint

    other_text = replace(PAIRS, texts=[*PAIRS.texts[:-1], ("the dog", "the cat")])
    keys = [
        key(),
        key(max_length=63),
        key(token_types=True),
        key(tokenizer=word_tokenizer(WORDS[1:])),
        key(other_text),
        key(replace(PAIRS, labels=np.zeros(5, dtype=np.int64))),
        key(replace(PAIRS, labels=np.ones(5, dtype=np.float32))),
        key(SINGLE),
    ]
    asked = Questions("q", [("where", "the dog runs")], [(("dog", 4),)])
    keys += [key(asked, form=QuestionForm(asked, shared)) for shared in (0, 1)]
    assert len(set(keys)) == len(keys)
    assert key(replace(PAIRS, name="another name")) == keys[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(keys)


def test_missing_and_damaged_caches(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task.cache: .* is missing; rank 0 builds it fi"):
        encode(SINGLE, tokenizer, tmp_path, build=False)
    assert not list(tmp_path.iterdir())
    folder = tmp_path / encode(SINGLE, tokenizer, tmp_path).fingerprint
    (folder / "tokens.bin").unlink()
    with pytest.raises(UserError, match=r"^task.cache: .* is missing; rank 0 builds it first"):
        encode(SINGLE, tokenizer, tmp_path, build=False)
    assert len(encode(SINGLE, tokenizer, tmp_path)) == 5
    shutil.rmtree(folder)
    assert len(encode(SINGLE, tokenizer, tmp_path)) == 5


def test_a_cache_that_can_not_be_written_is_named_by_its_field(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"^task.cache: cannot write under .*file"):
        encode(SINGLE, tokenizer, tmp_path / "file")


@pytest.mark.parametrize(("examples", "size"), [(SINGLE, 2), (PAIRS, 4)], ids=["single", "pairs"])
def test_no_room_for_text(
    examples: Examples, size: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"max_length: {size} given, but special tokens take"):
        encode(examples, tokenizer, tmp_path, max_length=size)
    assert not list(tmp_path.iterdir())


def test_models_that_want_token_types(tokenizer: PreTrainedTokenizerFast) -> None:
    wanted = {"bert": True, "roberta": False, "distilbert": False, "gpt2": False, "modernbert": 0}
    assert {name: uses_token_types(tiny_config(name), tokenizer) for name in wanted} == wanted


def test_tokenizers_that_give_token_types(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bert = tiny_config("bert")
    # transformers' default leaves them out, though the frame of a pair has them
    assert "token_type_ids" not in tokenizer.model_input_names
    assert uses_token_types(bert, tokenizer)
    name_token_types(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a", "the")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert uses_token_types(bert, again)
    # what a folder says decides
    again.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    assert not uses_token_types(bert, again)


def test_padding_of_a_tokenizer_without_a_token_for_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.pad_token = None
    made = encode(SINGLE, tokenizer, tmp_path)
    assert made.pad_id == 0
    tokenizer.eos_token = "dog"
    assert encode(SINGLE, tokenizer, tmp_path / "b").pad_id == tokenizer.eos_token_id > 0
