"""Files without a document are fine beside others, and one line where there is nothing else."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from tiny_models import tiny_tokenizer, write_text

from fastkd.data.text import Corpus, prepare_corpus
from fastkd.data.text.settings import TextSettings
from fastkd.errors import UserError


def bytes_of(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def table(kind: str | None) -> datasets.Dataset:
    """Without rows; `None` is a column without a type, as pandas writes it."""
    features = datasets.Features({"text": datasets.Value(kind or "null")})
    return datasets.Dataset.from_dict({"text": []}, features=features)


def parquet(kind: str | None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        table(kind).to_parquet(str(folder / "e.parquet"))
        return folder / "e.parquet"

    return write


def saved(folder: Path) -> Path:
    table("string").save_to_disk(str(folder / "saved"))
    return folder / "saved"


def saved_split(folder: Path) -> Path:
    datasets.DatasetDict(train=table("string")).save_to_disk(str(folder / "dict"))
    return folder / "dict"


EMPTY = pytest.mark.parametrize(
    "write",
    [
        pytest.param(bytes_of("e.txt", b""), id="txt"),
        pytest.param(bytes_of("e.txt", b"\n \t\n\r\n"), id="blank txt"),
        pytest.param(bytes_of("e.txt.gz", gzip.compress(b"")), id="gz of nothing"),
        pytest.param(bytes_of("e.jsonl", b""), id="jsonl"),
        pytest.param(bytes_of("e.jsonl", b'{"text": " "}\n'), id="blank jsonl"),
        pytest.param(parquet("string"), id="parquet"),
        pytest.param(parquet("large_string"), id="parquet of large strings"),
        pytest.param(parquet(None), id="parquet without a type"),
        pytest.param(saved, id="saved"),
        pytest.param(saved_split, id="saved split"),
    ],
)
BOTH = pytest.mark.parametrize("streaming", [False, True])


def prepare(folder: Path, *names: Path, heldout: Path | None = None, streaming: bool) -> Corpus:
    data = TextSettings(
        train=tuple(map(str, names)),
        heldout=None if heldout is None else (str(heldout),),
        block_size=16,
        heldout_fraction=0.3,
        workers=1,
        cache=str(folder / "cache"),
        streaming=streaming,
    )
    return prepare_corpus(data, tiny_tokenizer(), progress=False)


@EMPTY
@BOTH
def test_an_empty_file_beside_others_adds_nothing(
    tmp_path: Path, write: Callable[[Path], Path], streaming: bool
) -> None:
    text = write_text(tmp_path / "text.txt")
    alone = prepare(tmp_path, text, streaming=streaming)
    for names in ((text, write(tmp_path)), (write(tmp_path), text)):
        found = prepare(tmp_path, *names, streaming=streaming)
        assert torch.equal(found.heldout, alone.heldout)
        assert found.train_tokens == alone.train_tokens
        assert found.stream(4, 0).next_batch().shape == (4, 16)


@EMPTY
@BOTH
def test_nothing_but_an_empty_file_is_one_line(
    tmp_path: Path, write: Callable[[Path], Path], streaming: bool
) -> None:
    empty, text = write(tmp_path), write_text(tmp_path / "text.txt")
    with pytest.raises(UserError, match=rf"^data\.train: {empty}: no text in it; give files"):
        prepare(tmp_path, empty, streaming=streaming)
    with pytest.raises(UserError, match=rf"^data\.train: {empty}: no text in it; give files"):
        prepare(tmp_path, empty, heldout=text, streaming=streaming)
    with pytest.raises(UserError, match=rf"^data\.heldout: {empty}: no text in it; give files"):
        prepare(tmp_path, text, heldout=empty, streaming=streaming)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("e.parquet", "cannot be read as Parquet: "),
        ("e.txt.gz", "not a complete gzip file"),
        ("e.jsonl.gz", "not a complete gzip file"),
    ],
)
@BOTH
def test_a_file_of_no_bytes_is_damaged_where_its_form_has_some(
    name: str, said: str, tmp_path: Path, streaming: bool
) -> None:
    (tmp_path / name).write_bytes(b"")
    text = write_text(tmp_path / "text.txt")
    with pytest.raises(UserError, match=rf"{name}: {said}") as refused:
        prepare(tmp_path, text, tmp_path / name, streaming=streaming)
    assert "\n" not in str(refused.value)


def test_an_empty_shard_needs_the_column_too(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": []}).to_parquet(str(tmp_path / "e.parquet"))
    with pytest.raises(UserError, match=r"e\.parquet: no column 'text'; it has 'body'"):
        prepare(tmp_path, tmp_path / "e.parquet", streaming=False)
