"""Readers from outside: a suffix or a name, the same checks and the same cache as other text."""

from __future__ import annotations

import functools
import importlib
import sqlite3
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer, write_text

from fastkd.data.text import TextSettings, prepare_corpus, readers, register_reader
from fastkd.data.text.sources import resolve
from fastkd.errors import UserError
from fastkd.recipe import Data


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test registers is left."""
    monkeypatch.setattr(readers, "_readers", {})


def pieces(place: str) -> Iterator[str]:
    """Documents between lines of dashes."""
    yield from Path(place).read_text(encoding="utf-8").split("\n---\n")


def settings(tmp_path: Path, *names: object, **more: Any) -> TextSettings:
    return TextSettings(train=tuple(map(str, names)), cache=str(tmp_path / "cache"), **more)


def documents(tmp_path: Path, *names: object) -> list[str]:
    wanted = settings(tmp_path, *names)
    return [text for source in resolve(wanted.train, wanted) for text in source.documents()]


def test_settings_are_those_of_the_recipe() -> None:
    section = {name: field.default for name, field in Data.model_fields.items()}
    plain = {field.name: field.default for field in fields(TextSettings)}
    # what is of rows alone stands in their form
    of_rows = {"columns", "candidates", "scores", "prompts", "batch_tokens"}
    assert plain.keys() == section.keys() - of_rows
    assert {k: v for k, v in plain.items() if k != "train"} == {
        k: v for k, v in section.items() if k in plain and k != "train"
    }


def test_a_suffix_is_read_alone_in_folders_and_in_globs(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one\n---\ntwo\n---\n \n---\nthree")
    (tmp_path / "b.txt").write_text("four\n")
    with pytest.raises(UserError, match=r"cannot tell the format of .*a\.md"):
        documents(tmp_path, tmp_path / "a.md")
    register_reader(".md")(pieces)
    for name in (tmp_path / "a.md", tmp_path / "*.md"):
        assert documents(tmp_path, name) == ["one", "two", "three"]
    assert documents(tmp_path, tmp_path) == ["one", "two", "three", "four"]
    with pytest.raises(UserError, match=r"cannot tell the format of .*; expected .*, \.md"):
        documents(tmp_path, write_text(tmp_path / "c.unknown", documents=1, words=1))


def test_a_name_reads_what_stands_behind_the_colon(tmp_path: Path) -> None:
    seen: list[str] = []

    @register_reader("mail")
    def mailbox(place: str) -> Iterator[str]:
        seen.append(place)
        yield from ("first", "", "second")

    assert documents(tmp_path, "mail:here:there") == ["first", "second"]
    assert seen == ["here:there"]
    # without a reader of that name it is one of the hub's, or a path
    with pytest.raises(UserError, match="no file or folder 'post:/here'"):
        documents(tmp_path, "post:/here")


def test_the_cache_knows_content_and_reader(tmp_path: Path) -> None:
    said = ["a b", "c d"]

    @register_reader("list")
    def listed(place: str) -> list[str]:
        return said

    @register_reader("other")
    def other(place: str) -> list[str]:
        return said

    def digest(name: str) -> str:
        (source,) = resolve([name], settings(tmp_path, name))
        return source.digest(quick=False)

    first = digest("list:x")
    assert first == digest("list:x") and len({first, digest("list:y"), digest("other:x")}) == 3
    said.append("e")
    assert digest("list:x") != first
    path = tmp_path / "a.file"
    path.write_text("a")
    before = digest(f"list:{path}")
    path.write_text("b")
    assert digest(f"list:{path}") != before


def test_the_cache_knows_what_the_module_of_a_reader_said_when_it_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "readers_of_a_test.py"
    path.write_text("def read(place):\n    return [open(place).read()]\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(path.stem)
    register_reader(".md")(module.read)
    (tmp_path / "a.md").write_text("a")

    def digest() -> str:
        (source,) = resolve([str(tmp_path / "a.md")], settings(tmp_path))
        return source.digest(quick=False)

    before = digest()
    # the code that runs is still the old one, and its text must not stand for the new one's
    path.write_text(path.read_text().replace("read()", "read().upper()"))
    assert digest() == before
    register_reader(".md")(importlib.reload(module).read)
    edited = digest()
    # code that lies in no file is known by what it gives
    monkeypatch.delitem(vars(importlib.reload(module)), "__file__")
    without = digest()
    (tmp_path / "a.md").write_text("b")
    assert len({before, edited, without, digest()}) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_blocks_are_those_of_the_same_text_in_a_file(tmp_path: Path, streaming: bool) -> None:
    text = write_text(tmp_path / "text.txt", documents=40, words=40)
    copy = tmp_path / "text.md"
    copy.write_text("\n---\n".join(text.read_text().strip().split("\n\n")))
    register_reader(".md")(pieces)
    shape = {"block_size": 16, "heldout_fraction": 0.2, "workers": 1, "streaming": streaming}
    found = [
        prepare_corpus(settings(tmp_path, path, **shape), tiny_tokenizer(), progress=False)
        for path in (text, copy)
    ]
    assert found[0].heldout.equal(found[1].heldout) and len(found[0].heldout)
    assert found[0].fingerprint != found[1].fingerprint


@pytest.mark.parametrize(
    "given", ["Hello", b"Hello", {"a": "Hello"}, {"Hello"}], ids=lambda given: type(given).__name__
)
def test_a_reader_that_gives_no_documents_is_one_line(tmp_path: Path, given: Any) -> None:
    """Its characters, keys or elements without an order would be documents."""
    register_reader("whole")(lambda place: given)
    said = (
        rf"^data: whole:x: reader \S+ gave {type(given).__name__}, expected documents in an order"
    )
    with pytest.raises(UserError, match=said):
        documents(tmp_path, "whole:x")


def broken(place: str) -> Iterator[Any]:
    """Gives what its place says."""
    yield "fine"
    if place == "number":
        yield 7
    elif place == "half":
        yield "\ud800"
    elif place == "database":
        sqlite3.connect(":memory:").execute("SELECT body FROM mial")
    else:
        raise KeyError("no such field")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("number", "gave int as document 2, expected text"),
        ("half", "gave half a character as document 2"),
        ("database", r"fails \(OperationalError: no such table: mial, line \d+ of .*\.py\); mend"),
        (
            "raises",
            r"fails \(KeyError: 'no such field', line \d+ of .*\.py\); mend the file or the",
        ),
    ],
)
def test_a_reader_that_goes_wrong_is_one_line(tmp_path: Path, place: str, said: str) -> None:
    register_reader("broken")(broken)
    with pytest.raises(UserError, match=rf"data: broken:{place}: (reader )?[\w.]*broken {said}"):
        documents(tmp_path, f"broken:{place}")


@pytest.mark.parametrize("form", ["", ".", "md.", "a:b", ".MD", "a b", "é", "../x"])
def test_a_form_is_a_suffix_or_a_name(form: str) -> None:
    with pytest.raises(UserError, match="expected a suffix such as"):
        register_reader(form)


def test_what_has_no_name_of_its_own_reads_nothing() -> None:
    # the cache would know a partial by the module of functools
    for reader, kind in ((functools.partial(pieces), "partial"), ("pieces", "str")):
        with pytest.raises(UserError, match=rf"^reader '.md': a {kind} has no name; give a func"):
            register_reader(".md")(reader)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a suffix such as"):
        register_reader(pieces)  # type: ignore[arg-type]


def test_a_form_has_one_reader() -> None:
    register_reader("mail")(pieces)
    register_reader("mail")(pieces)
    with pytest.raises(UserError, match=r"reader 'mail': .*pieces reads it already"):
        register_reader("mail")(broken)
    with pytest.raises(UserError, match=r"reader '.txt': fastkd reads it already"):
        register_reader(".txt")(pieces)
