"""Every form of text gives the same documents, and every mistake one clear line."""

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastkd.data.text import files as readers
from fastkd.data.text.settings import TextSettings
from fastkd.data.text.sources import resolve
from fastkd.errors import UserError

DOCUMENTS = ["First paragraph.\nSecond paragraph.", "Zürich 東京 🎉", "The third document."]


def documents(*names: object, **settings: Any) -> list[str]:
    data = TextSettings(train=tuple(map(str, names)), **settings)
    return [text for source in resolve(data.train, data) for text in source.documents()]


def as_text(path: Path) -> Path:
    path.write_text("\n\n".join(DOCUMENTS) + "\n")
    return path


def as_json_lines(path: Path) -> Path:
    path.write_text(
        "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(DOCUMENTS))
    )
    return path


def zipped(path: Path) -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})


def as_parquet(path: Path) -> Path:
    table().to_parquet(str(path))
    return path


def as_saved(path: Path) -> Path:
    table().save_to_disk(str(path))
    return path


def as_saved_dict(path: Path) -> Path:
    datasets.DatasetDict(train=table(), test=table().select([0])).save_to_disk(str(path))
    return path


def as_folder(path: Path) -> Path:
    path.mkdir()
    as_text(path / "b.txt")
    (path / "README.md").write_text("no data")
    return path


def as_glob(path: Path) -> Path:
    path.mkdir()
    as_text(path / "part-00.txt")
    return path / "part-*.txt"


FORMS: list[tuple[str, Callable[[Path], Path]]] = [
    ("a.txt", as_text),
    ("a.txt", lambda path: zipped(as_text(path))),
    ("a.jsonl", as_json_lines),
    ("a.jsonl", lambda path: zipped(as_json_lines(path))),
    ("a.parquet", as_parquet),
    ("saved", as_saved),
    ("saved-dict", as_saved_dict),
    ("folder", as_folder),
    ("many", as_glob),
]


@pytest.mark.parametrize(("name", "write"), FORMS)
def test_every_form_gives_the_same_documents(
    tmp_path: Path, name: str, write: Callable[[Path], Path]
) -> None:
    source = write(tmp_path / name)
    assert documents(source, cache=str(tmp_path / "cache")) == DOCUMENTS


def test_sources_keep_the_order_of_the_recipe_and_files_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "z.txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    found = documents(tmp_path / "z.txt", tmp_path / "[ab].txt")
    assert found == ["text of z.txt", "text of a.txt", "text of b.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one\n")
    assert documents(tmp_path / "a[1].txt") == ["one"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_blank_lines(tmp_path: Path, end: str) -> None:
    lines = ["", "one", "still one", "  \t", "", "two", "", ""]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    assert documents(tmp_path / "a.txt") == ["one\nstill one", "two"]
    assert documents(tmp_path / "a.txt", documents="line") == ["one", "still one", "two"]


def test_only_line_ends_end_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\u2028same\x0bsame\x0csame\x85same")
    assert len(documents(tmp_path / "a.txt", documents="line")) == 1


def test_blank_rows_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n\n{"text": ""}\n{"text": "one"}\n')
    assert documents(tmp_path / "a.jsonl") == ["one"]


def test_text_column_and_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    assert documents(tmp_path / "a.jsonl", text_column="body") == ["one"]
    (tmp_path / "a.csv").write_text('n,body\n1,"one, ""two"""\n2, \n\n3,"three\nfour"\n')
    expected = ['one, "two"', "three\nfour"]
    assert documents(tmp_path / "a.csv", text_column="body") == expected
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b'n\tbody\n1\tone "two\n\n2\t\n3\tthree\n'))
    assert documents(tmp_path / "a.tsv.gz", text_column="body") == ['one "two', "three"]
    saved = as_saved_dict(tmp_path / "saved")
    assert documents(saved, split="test") == DOCUMENTS[:1]


def test_a_tsv_file_that_looks_quoted_is_refused_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As pandas and spreadsheets write it; quotes of the text's own are read as they stand."""
    path = tmp_path / "a.tsv"
    rows = [['he said "no" to her', "0"], ["plain", "1"]]
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["text", "n"], *rows])
    with pytest.raises(UserError, match=r"a\.tsv, line 2: a cell looks quoted .* save it as \.csv"):
        documents(path)
    path.rename(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text().replace("\t", ","))
    assert documents(tmp_path / "a.csv") == [text for text, _ in rows]

    for texts in (['"Yes."', "Yes, no."], ['"a, b"', "c"], ['"a "b" c"'], ['"a"", b'], ['""']):
        path.write_text("\n".join(["text", *texts]) + "\n")
        assert documents(path) == texts
    assert not caplog.records
    texts = ["plain", '"one, two"', '"three, four"']
    path.write_text("\n".join(["text", *texts]) + "\n")
    assert documents(path) == texts
    assert "a.tsv, line 3 and 1 more: quotes stand around all cells with a comma" in caplog.text


def test_a_file_of_another_form_is_other_text(tmp_path: Path) -> None:
    digests = set()
    for name in ("a.csv", "b.csv", "a.tsv"):
        (tmp_path / name).write_text('text\n"one"\n')
        (source,) = resolve([str(tmp_path / name)], TextSettings(train=()))
        digests.add(source.digest(quick=False))
    assert len(digests) == 2


def test_python_docs_are_in_every_python() -> None:
    topics = documents("python-docs")
    assert len(topics) > 50
    assert any("lambda" in text for text in topics)


def content(name: str, data: bytes | str) -> Callable[[Path], Path]:
    """A writer of one file."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return folder / name

    return write


MISTAKES = [
    pytest.param(lambda d: d / "gone.txt", r"no file or folder '.*gone\.txt'", id="missing"),
    pytest.param(lambda d: d / "*.txt", r"no file matches '.*\*\.txt'", id="glob"),
    pytest.param(content("a.xml", "x"), r"cannot tell the format of '.*a\.xml'", id="extension"),
    pytest.param(lambda d: d, r"folder '.*' holds no \.txt, \.txt\.gz", id="empty folder"),
    pytest.param(content("a.txt", b"ok\n\nbad \xff"), r"byte 8 is not UTF-8 \(0xff\)", id="utf-8"),
    pytest.param(
        content("a.txt.gz", gzip.compress(b"text " * 999)[:-20]), r"not a complete gzip", id="cut"
    ),
    pytest.param(content("a.txt.gz", b"plain text"), r"not a complete gzip file", id="no gzip"),
    pytest.param(
        content("a.txt.gz", b""),
        r"a\.txt\.gz: not a complete gzip file \(it has no b",
        id="no bytes",
    ),
    pytest.param(
        content("a.txt.gz", gzip.compress(b"")[:10] + b"\xff" * 99),
        r"not a complete gzip file .*invalid block type",
        id="corrupt gzip",
    ),
    pytest.param(content("a.jsonl", '{"text": "a"}\n{text'), r"line 2: not a JSON", id="json"),
    pytest.param(
        content("a.jsonl", '{"text": "a", "n": 1, "text": "b"}'),
        r"line 1: not a JSON object: 'text' stands twice",
        id="twice",
    ),
    pytest.param(content("a.jsonl", '{"n": ' + "9" * 5000 + "}"), r"line 1: not a JSON", id="long"),
    pytest.param(content("a.jsonl", "[1]"), r"line 1: expected a JSON object, not list", id="list"),
    pytest.param(
        content("a.jsonl", '{"id": 1, "body": ""}'),
        r"no column 'text'; it has 'id', 'body'",
        id="col",
    ),
    pytest.param(content("a.jsonl", '{"text": null}'), r"line 1: .* holds null", id="null"),
    pytest.param(content("a.jsonl", '{"text": 7}'), r"line 1: .* holds int", id="int"),
    pytest.param(
        content("a.jsonl", '{"text": [{"role": "user", "content": "a", "n": 1}]}'),
        r"line 1: column 'text' holds a conversation, .*\.apply_chat_template\(..., tok",
        id="chat",
    ),
    pytest.param(
        content("a.jsonl", '{"text": [{"role": "user"}]}'), r"holds list, .* remove or", id="role"
    ),
    pytest.param(
        content("a.jsonl", '{"text": "\\ud800"}'), r"half a surrogate pair", id="surrogate"
    ),
    pytest.param(content("a.parquet", b"PAR1"), r"cannot be read as Parquet", id="no parquet"),
]


@pytest.mark.parametrize(("write", "message"), MISTAKES)
def test_mistakes(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(UserError, match=message) as raised:
        documents(write(folder), cache=str(tmp_path / "cache"))
    assert "\n" not in str(raised.value)


def test_mistakes_in_tables(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": ["a", None], "number": [1, 2]})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        with pytest.raises(UserError, match=r"row 2: column 'text' holds null"):
            documents(tmp_path / name, cache=cache)
        with pytest.raises(UserError, match=r"row 1: column 'number' holds int"):
            documents(tmp_path / name, cache=cache, text_column="number")
        with pytest.raises(UserError, match=r"no column 'body'; it has 'text', 'number'"):
            documents(tmp_path / name, cache=cache, text_column="body")
    with pytest.raises(
        UserError, match=r"no split 'dev'; set data.split to one of \['train', 'test'"
    ):
        documents(as_saved_dict(tmp_path / "dict"), split="dev")
    for arrow in (tmp_path / "saved").glob("*.arrow"):
        arrow.unlink()
    with pytest.raises(UserError, match=r"saved: not a complete saved data set"):
        documents(tmp_path / "saved")


def test_text_without_document_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "DOCUMENT_LIMIT", 1 << 10)
    (tmp_path / "a.txt").write_text("a line of text\n" * 100)
    with pytest.raises(UserError, match=r"without an empty line.*set data\.documents to line"):
        documents(tmp_path / "a.txt")
    assert len(documents(tmp_path / "a.txt", documents="line")) == 100
    (tmp_path / "b.txt").write_text("words " * 999)
    with pytest.raises(UserError, match=r"a line of more than"):
        documents(tmp_path / "b.txt", documents="line")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_name_that_cannot_be_reached(tmp_path: Path, streaming: bool) -> None:
    with pytest.raises(
        UserError, match=r"'nobody/nothing:sub' is no file or folder here, and as a"
    ):
        documents("nobody/nothing:sub", streaming=streaming, cache=str(tmp_path))


@pytest.mark.parametrize("name", ["text", "json", "pandas", "text:en", "webdataset"])
@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_datasets_takes_for_its_readers_read_no_file(
    name: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_dataset("text")` is all files below the working folder, whatever their names."""
    content("notes.log", '{"text": "private"}\n')(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"'{name}' is no file or folder here, and .* its reader"):
        documents(name, streaming=streaming, cache=str(tmp_path / "cache"))


def test_a_subset_of_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'mine:en' names a subset .* but 'mine' is a folder here"):
        documents("mine:en", cache=str(tmp_path / "cache"))


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    # whatever the folder itself is called
    folder = tmp_path / ".data"
    for name in ("a.txt", ".ipynb_checkpoints/a-checkpoint.txt", ".b.txt", "c/.d/e.txt", "c/f.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    assert documents(folder) == ["a.txt", "c/f.txt"]
    assert documents(folder / "**" / "*.txt") == ["a.txt", "c/f.txt"]


def test_parquet_reads_no_more_than_its_columns(tmp_path: Path) -> None:
    """`datasets` has no type for maps; of two columns of one name Arrow gives the second."""
    maps = pa.array([[("k", "v")], []], pa.map_(pa.string(), pa.string()))
    text = pa.array(["one", "two"])
    for names, columns in ((["text", "meta"], [text, maps]), (["text", "n", "n"], [text] * 3)):
        pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "a.parquet")
        assert documents(tmp_path / "a.parquet") == ["one", "two"]
    pq.write_table(pa.Table.from_arrays([text, text], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column 'text' stands twice; rename one"):
        documents(tmp_path / "a.parquet")


def test_hub_name_and_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append((args, kwargs))
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents("owner/name:subset", split="test", cache=str(tmp_path)) == DOCUMENTS
    assert documents("name", streaming=True, cache=str(tmp_path)) == DOCUMENTS
    folder = str(tmp_path / "datasets")
    assert calls == [
        (("owner/name", "subset"), {"split": "test", "streaming": False, "cache_dir": folder}),
        (("name", None), {"split": "train", "streaming": True, "cache_dir": folder}),
    ]


def test_nothing_is_written_outside_the_cache(tmp_path: Path) -> None:
    """In a process of its own: `datasets` fixes its folders when it is imported."""
    home = tmp_path / "home"
    home.mkdir()
    as_text(tmp_path / "a.txt")
    as_parquet(tmp_path / "b.parquet")
    as_saved(tmp_path / "saved")
    names = [str(tmp_path / name) for name in ("a.txt", "b.parquet", "saved")]
    code = f"""
from test_data_sources import documents
assert len(documents(*{names!r}, cache={str(tmp_path / "cache")!r})) == 9
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parent,
        check=True,
    )
    assert [path for path in home.rglob("*") if path.is_file()] == []
