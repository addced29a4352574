"""A user without a home folder, as in containers that run as a bare number: it is rarely needed."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest
from tiny_models import VOCABULARY, tiny_tokenizer, write_text
from tiny_runs import make_recipe

import fastkd
from fastkd.cli import doctor
from fastkd.data.text import prepare_corpus
from fastkd.data.text.settings import TextSettings
from fastkd.errors import UserError
from fastkd.recipe import load_recipe


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest calls it by the user's name, so it is made before
    assert tmp_path.is_dir()

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_what_names_all_its_folders_needs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(tmp_path, train={"steps": 1, "warmup_steps": 0})
    doctor(path)
    said = " ".join(capsys.readouterr().out.split())
    assert "teacher.cache is none; teacher.cache_folder is ~/.cache/fastkd, but there is no" in said
    fastkd.distill(path)
    # what the run notes of all fields names a cache of states in a home, too
    assert fastkd.evaluate(tmp_path / "run")


def test_who_needs_one_is_told_which_field_to_set(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", documents=60, words=60)
    with pytest.raises(UserError, match=r"^data\.cache is ~/\.cache.* give data\.cache another"):
        prepare_corpus(TextSettings(train=(str(text),)), tiny_tokenizer(VOCABULARY))
    path = make_recipe(tmp_path)
    with pytest.raises(UserError, match=r"run\.output: no such home folder \(given '~/run'\)"):
        load_recipe(path, ["run.output=~/run"])
    cached = ["teacher.cache=exact", "data.cache=~/cache"]
    assert load_recipe(path, cached).teacher.cache_folder == "~/.cache/fastkd"
    with pytest.raises(UserError, match=r"^data\.cache is ~/cache, but there is no home folder"):
        fastkd.distill(path, {"data.cache": "~/cache"})
    with pytest.raises(UserError, match=r"^teacher\.cache_folder is ~/\.cache/fastkd, but there"):
        fastkd.distill(path, {"teacher.cache": "exact"})
    assert not (tmp_path / "run").exists()
