"""Damaged model folders and data files are read, or refused in one line: never a traceback."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from fuzz_recipes import cases, refused
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, save_teacher

from fastkd.data.tasks import (
    Columns,
    Task,
    read_examples,
)
from fastkd.data.text.settings import TextSettings
from fastkd.data.text.sources import resolve
from fastkd.models import load_teacher, load_tokenizer
from fastkd.types import ModelSource

TASK = Task(name="own", columns=Columns(texts=("text",), label="label"), labels=("no", "yes"))

# of the numbers in a configuration
_LARGEST = 5000

SNIPPETS = [
    *(b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"{", b"]", b"[" * 3000, b'{"a":' * 3000),
    *(b"1" * 5000, b"1e999", b"-1", b"null", b"NaN", b"\t", b"\r", b"\n\n", b"\x1b[2J", b"PAR1"),
    *(b"PK\x03\x04", b"\x1f\x8b", b"../../x", b"[/x]", b"\xef\xbb\xbf", b"true", b'"\\ud800"'),
]


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with one to three places changed, cut off, doubled, or put in."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        # headers are where the trouble is
        place = place % 64 if draw(st.booleans()) else place
        length = draw(st.integers(0, 12))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "twice", "insert", "replace"]))
        head, tail = content[:place], content[place:]
        if kind == "flip":
            changed = bytes(b ^ draw(st.integers(1, 255)) for b in tail[:1])
            content = head + changed + tail[1:]
        elif kind == "cut":
            content = head
        elif kind == "drop":
            content = head + tail[length:]
        elif kind == "twice":
            content = head + tail[:length] + tail
        elif kind == "insert":
            content = head + draw(st.sampled_from(SNIPPETS)) + tail
        else:
            content = head + draw(st.sampled_from(SNIPPETS)) + tail[length:]
    return content


JSON = st.one_of(
    st.sampled_from([None, True, 0, -1, 1.5, 10**30, "", "a", [], {}, [None], {"a": 1}, "../../x"]),
    st.integers(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 300), max_size=3),
)


@st.composite
def changed(draw: st.DrawFn, tree: dict[str, Any], more: tuple[str, ...] = ()) -> bytes:
    """A JSON object with some values replaced."""
    tree = dict(tree)
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from([*tree, *more]))
        if draw(st.integers(0, 5)) == 0:
            tree.pop(key, None)
        else:
            tree[key] = draw(JSON)
    return json.dumps(tree).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(
        tmp_path_factory.mktemp("fuzz") / "m",
        num_hidden_layers=1,
        hidden_size=8,
        intermediate_size=8,
    )


@pytest.fixture
def restored(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "m"))


def read_both(folder: Path) -> None:
    teacher = ModelSource(str(folder))
    load_teacher(teacher)
    load_tokenizer(teacher, VOCABULARY)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_texts_of_a_model_are_refused_in_one_line(restored: Path, file: str) -> None:
    path = restored / file
    content = path.read_bytes()
    extra = ("architectures", "auto_map", "quantization_config", "torch_dtype", "model_type")
    objects = changed(json.loads(content), extra) if file != "tokenizer.json" else damage(content)

    @cases(40)
    @given(damage(content) | objects)
    def try_one(given: bytes) -> None:
        # a model of so many numbers is no damage, and takes all memory there is
        assume(max(map(int, re.findall(rb"\d{1,300}", given)), default=0) <= _LARGEST)
        path.write_bytes(given)
        read = load_tokenizer if file.startswith("tokenizer") else load_teacher
        options = (VOCABULARY,) if read is load_tokenizer else ()
        refused(lambda: read(ModelSource(str(restored)), *options))

    try_one()


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_damaged_weights_are_refused_in_one_line(restored: Path) -> None:
    path = restored / "model.safetensors"
    content = path.read_bytes()
    header, data = header_of(content)
    names = st.sampled_from([name for name in header if name != "__metadata__"])
    entries = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F64", "I8", "BOOL", "X", "", 3, None]),
            "shape": st.lists(st.integers(-1, 2**63), max_size=3) | JSON,
            "data_offsets": st.lists(st.integers(-1, 2**63), max_size=3) | JSON,
        },
    )

    @cases(60)
    @given(damage(content) | st.tuples(names, entries))
    def try_one(given: bytes | tuple[str, dict[str, Any]]) -> None:
        if isinstance(given, tuple):
            name, entry = given
            made = json.dumps({**header, name: {**header[name], **entry}}).encode()
            given = len(made).to_bytes(8, "little") + made + data
        path.write_bytes(given)
        refused(lambda: load_teacher(ModelSource(str(restored))))

    try_one()


ROWS = [("w5 w6", "no"), ("w7 é", "yes"), ('"w8', "no"), ("w9", "yes")]


def parquet_bytes(folder: Path) -> bytes:
    path = folder / "made.parquet"
    columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    Dataset.from_dict(columns).to_parquet(path)
    return path.read_bytes()


def csv_bytes(_: Path) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("text", "label"), *ROWS])
    return text.getvalue().encode()


FILES: dict[str, Callable[[Path], bytes]] = {
    "tsv": lambda _: "\n".join(["text\tlabel", *map("\t".join, ROWS)]).encode(),
    "tsv.gz": lambda f: gzip.compress(FILES["tsv"](f)),
    "jsonl": lambda _: "\n".join(json.dumps({"text": t, "label": y}) for t, y in ROWS).encode(),
    "jsonl.gz": lambda f: gzip.compress(FILES["jsonl"](f)),
    "txt": lambda _: "\n\n".join(text for text, _ in ROWS).encode(),
    "txt.gz": lambda f: gzip.compress(FILES["txt"](f)),
    "parquet": parquet_bytes,
    "csv": csv_bytes,
}


@pytest.mark.parametrize("ending", ["tsv", "tsv.gz", "csv", "jsonl", "jsonl.gz"])
def test_damaged_tasks_are_refused_in_one_line(tmp_path: Path, ending: str) -> None:
    content = FILES[ending](tmp_path)
    path = tmp_path / f"train.{ending}"

    @cases(60)
    @given(damage(content))
    def try_one(given: bytes) -> None:
        path.write_bytes(given)
        refused(lambda: read_examples(TASK, tmp_path, "train", tmp_path / "cache"))

    try_one()


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "txt", "txt.gz", "parquet", "csv", "tsv"])
def test_damaged_texts_are_refused_in_one_line(tmp_path: Path, ending: str) -> None:
    content = FILES[ending](tmp_path)
    path = tmp_path / f"text.{ending}"
    data = TextSettings(train=(str(path),), cache=str(tmp_path / "cache"), workers=1)

    def read_all() -> list[str]:
        sources = resolve(data.train, data)
        for source in sources:
            source.digest(quick=False)
        return [text for source in sources for text in source.documents()]

    @cases(20 if ending == "parquet" else 40)
    @given(damage(content))
    def try_one(given: bytes) -> None:
        path.write_bytes(given)
        refused(read_all)

    try_one()


def saved_files(folder: Path) -> Iterator[Path]:
    columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    Dataset.from_dict(columns).save_to_disk(str(folder))
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def test_damaged_saved_data_sets_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    files = {path: path.read_bytes() for path in saved_files(folder)}
    data = TextSettings(train=(str(folder),), cache=str(tmp_path / "cache"), workers=1)

    def read_all() -> list[str]:
        return [text for source in resolve(data.train, data) for text in source.documents()]

    @cases(80)
    @given(st.sampled_from(list(files)).flatmap(lambda p: st.tuples(st.just(p), damage(files[p]))))
    def try_one(given: tuple[Path, bytes]) -> None:
        path, content = given
        # a new file: the one before may still be mapped
        path.unlink()
        path.write_bytes(content)
        refused(read_all)
        path.unlink()
        path.write_bytes(files[path])

    try_one()


def test_a_token_of_unknown_words_that_is_unknown_is_refused(restored: Path) -> None:
    path = restored / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "unk_token": None, "pad_token": "?"})
    )
    tokens = restored / "tokenizer.json"
    tree = json.loads(tokens.read_text())
    tokens.write_text(json.dumps({**tree, "added_tokens": []}))
    refused(lambda: load_tokenizer(ModelSource(str(restored)), VOCABULARY))


@pytest.mark.parametrize("given", [True, 3, "BertModel", [3], {"a": 1}])
def test_architectures_that_are_no_list_of_names_are_refused(restored: Path, given: Any) -> None:
    path = restored / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": given}))
    assert refused(lambda: load_teacher(ModelSource(str(restored))))


def test_the_undamaged_are_read(folder: Path, tmp_path: Path) -> None:
    read_both(folder)
    for ending in ("tsv", "tsv.gz", "csv", "jsonl", "jsonl.gz"):
        (tmp_path / ending).mkdir()
        (tmp_path / ending / f"train.{ending}").write_bytes(FILES[ending](tmp_path))
        found = read_examples(TASK, tmp_path / ending, "train", tmp_path / "cache")
        assert found.texts == [(text,) for text, _ in ROWS]
