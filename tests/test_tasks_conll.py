"""Files of CoNLL: words with blanks inside, comments and words that look like some, columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tasks import write_lines

from fastkd.data.tasks import Columns, Task
from fastkd.data.tasks.words import read_words
from fastkd.errors import UserError

TASK = Task(
    name="names",
    kind="token_classification",
    columns=Columns(texts=("tokens",), label="tags"),
    labels=("O", "B-PER", "I-PER"),
)


def read(folder: Path, *lines: str, task: Task = TASK) -> list[list[tuple[str, str]]]:
    """The words of each text with their classes."""
    write_lines(folder / "train.conll", *lines)
    found = read_words(task, folder, "train", folder)
    return [
        [(word, task.labels[n]) for word, n in zip(words, classes, strict=True)]
        for words, classes in found
    ]


def test_a_word_ends_at_a_tab_where_its_line_has_one(tmp_path: Path) -> None:
    lines = ["10\u00a0000\tO", "New York \tB-PER", "of Jean\t O", " ", "Jean\tB-PER"]
    assert read(tmp_path, *lines) == [
        [("10\u00a0000", "O"), ("New York", "B-PER"), ("of Jean", "O")],
        [("Jean", "B-PER")],
    ]
    # a no-break space is part of a word also where blanks split columns
    assert read(tmp_path, "10\u00a0000  NN O", "Jean NN B-PER ") == [
        [("10\u00a0000", "O"), ("Jean", "B-PER")]
    ]


COMMENTS = ("# sent_id = O", "# newdoc", "# text = Jean saw # and #x", "# O")


@pytest.mark.parametrize("comment", COMMENTS)
def test_comments_of_conll_u_are_no_words(comment: str, tmp_path: Path) -> None:
    text = [comment, "#\tO", comment, "#x\tB-PER"]
    expected = [("#", "O"), ("#x", "B-PER")]
    assert read(tmp_path, *text, "", *text) == [expected, expected]


@pytest.mark.parametrize("comment", COMMENTS)
def test_a_word_that_looks_like_a_comment_has_the_columns_of_one(
    comment: str, tmp_path: Path
) -> None:
    """Columns of which blanks are the ends."""
    expected = [("#", "O"), ("Jean", "B-PER"), ("#", "I-PER"), ("#x", "O")]
    lines = ["# NN B-NP O", "Jean NN B-NP B-PER", comment, "# NN I-NP I-PER", "#x NN O O"]
    assert read(tmp_path, comment, *lines) == [expected]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("New York B-PER", "line 3: 3 columns, expected 2 as line 2 has"),
        ("Jean\t", "line 3: no class in the 2 columns"),
        ("\tO", "line 3: no word in the 2 columns"),
        ("#x", "line 3: one column, '#x', expected a word and a class"),
        ("Jean\tNN\tB-PER", "line 3: 3 columns, expected 2 as line 2 has"),
    ],
)
def test_a_line_that_is_no_word_with_a_class_is_refused(
    line: str, said: str, tmp_path: Path
) -> None:
    separator = "\t" if "\t" in line else " "
    with pytest.raises(UserError, match=rf"train\.conll, {said}"):
        read(tmp_path, "# said by nobody", f"dog{separator}O", line, "cat O")


def test_a_broken_line_leaves_out_its_text(tmp_path: Path) -> None:
    lenient = replace(TASK, skip_broken_rows=True)
    whole = ["dog\tO", "cat\tO", ""]
    found = read(tmp_path, *whole, "dog\tO", "Jean", "cat\tO", "", *whole, task=lenient)
    assert found == [[("dog", "O"), ("cat", "O")]] * 2


def test_a_column_that_counts_words_is_not_read_as_words(tmp_path: Path) -> None:
    lines = ["# source", "1\tJean\tB-PER\tO", "2\tsees\tO\tO", "", "1\tJean\tB-PER\tO"]
    with pytest.raises(UserError, match=r"conll: the first column counts the words of every text"):
        read(tmp_path, *lines)
    assert read(tmp_path, "1 O", "2 O") == [[("1", "O"), ("2", "O")]]
    assert len(read(tmp_path, "1 CD O", "2 CD O", "", "dog NN O")) == 2
