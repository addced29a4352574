"""Folders of `datasets.save_to_disk`: the split that is asked for, and cells as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_models import tiny_tokenizer
from tiny_tasks import PAIRS, SCORES

from fastkd.data.pairs import read_pairs
from fastkd.data.tasks import Columns, Task, read_examples
from fastkd.data.tasks.words import read_words
from fastkd.data.text import TextSettings, prepare_corpus
from fastkd.data.text.sources import resolve
from fastkd.errors import UserError
from fastkd.row_form import RowForm

TEXTS = ["w5 w6", "w7 w8", "w9"]
PAIR = RowForm(columns=("a", "b"), named=True, scores=("y",))


def saved(path: Path, split: str | None, **columns: list[Any]) -> Path:
    """One data set, as of the split that it was loaded as."""
    rows = datasets.Dataset.from_dict(columns or {"text": TEXTS})
    datasets.Dataset(rows.data, split=split and datasets.NamedSplit(split)).save_to_disk(path)
    return path


def documents(path: Path, split: str) -> list[str]:
    data = TextSettings(train=(str(path),), split=split)
    return [text for source in resolve(data.train, data) for text in source.documents()]


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("dev", "dev"),
        (None, "train"),
        (None, "dev"),
        ("train[:10%]", "train"),
        ("train[:10%]+train[20:](pct1_dropremainder)", "train"),
        ("train[:10%]", "train[:10%]"),
        ("train+dev", "train+dev"),
    ],
)
def test_one_data_set_is_read_as_what_it_was_saved_as(
    stored: str | None, asked: str, tmp_path: Path
) -> None:
    assert documents(saved(tmp_path / "saved", stored), asked) == TEXTS


@pytest.mark.parametrize("stored", ["train", "train[:10%]", "train+dev", "train+dev[:3]"])
def test_one_data_set_is_not_read_as_another_split(stored: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", stored, text=TEXTS, a=TEXTS, b=TEXTS, y=["no", "no", "yes"])

    def refused(read: Callable[[], object], field: str) -> None:
        with pytest.raises(UserError) as said:
            read()
        assert f"the split {stored!r} alone, and 'dev' is asked for; set {field} to" in str(
            said.value
        )

    refused(lambda: documents(folder, "dev"), "data.split")
    refused(lambda: read_examples(PAIRS, folder, "dev", tmp_path), "task.train or task.evaluate")
    refused(
        lambda: read_pairs(str(folder), "dev", PAIR, str(tmp_path), "evaluate.pairs.x"),
        "evaluate.pairs.x.split",
    )


def test_held_out_text_may_be_of_another_split_than_the_usual_one(tmp_path: Path) -> None:
    """A recipe names one split, and two folders each hold one."""

    def heldout(split: str) -> int:
        settings = TextSettings(
            train=(str(tmp_path / split.strip("s")),),
            heldout=(str(tmp_path / "test"),),
            split=split,
            block_size=8,
            workers=0,
            cache=str(tmp_path / "cache"),
        )
        return len(prepare_corpus(settings, tiny_tokenizer(), progress=False).heldout)

    words = [" ".join(f"w{n}" for n in range(5 + k, 40)) for k in range(4)]
    for split in ("train", "dev", "test"):
        saved(tmp_path / split, split, text=[f"{text} {split}" for text in words])
    assert heldout("train") > 0
    with pytest.raises(UserError, match="the split 'test' alone, and 'dev' is asked for"):
        heldout("dev")


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
@pytest.mark.parametrize("columns", [None, ["y"]])
def test_cells_are_read_as_stored_whatever_the_format(
    form: str, columns: list[str] | None, tmp_path: Path
) -> None:
    stored = datasets.Dataset.from_dict(
        {
            "text": TEXTS,
            "a": TEXTS,
            "y": [0, 1, 5],
            "tokens": [["w5", "w6"]] * 3,
            "tags": [[0, 1]] * 3,
        }
    )
    datasets.DatasetDict(train=stored.with_format(form, columns=columns)).save_to_disk(
        tmp_path / "s"
    )
    assert documents(tmp_path / "s", "train") == TEXTS
    scores = read_examples(SCORES, tmp_path / "s", "train", tmp_path)
    assert list(scores) == [((text,), y) for text, y in zip(TEXTS, [0.0, 1.0, 5.0], strict=True)]
    classes = Task(name="t", columns=Columns(texts=("a",), label="y"), labels=("0", "1", "5"))
    assert read_examples(classes, tmp_path / "s", "train", tmp_path).labels.tolist() == [0, 1, 2]
    words = Task(
        name="w",
        kind="token_classification",
        columns=Columns(texts=("tokens",), label="tags"),
        labels=("O", "B-X", "I-X"),
    )
    tagged = read_words(words, tmp_path / "s", "train", tmp_path)
    assert tagged.words == [("w5", "w6")] * 3 and tagged.labels.tolist() == [0, 1] * 3
