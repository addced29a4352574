"""Texts whose words have classes: read from files, and tokenised with a label a word.

Words are joined by single spaces and tokenised as any text is, so that a pipeline that is given the
text reads the same tokens. A word's label stands at the first token that holds a part of it; its
further tokens have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from fastkd.data.sequences import (
    PAD_MULTIPLE,
    Batch,
    Sequences,
    Tokenised,
    frame,
    tokenised,
)
from fastkd.data.tasks.conll import conll_rows
from fastkd.data.tasks.read import Example, read_split
from fastkd.data.tasks.rows import Row, spelling_of
from fastkd.data.tasks.task import Task
from fastkd.data.tasks.tokenized import Beside, EncodedExamples
from fastkd.data.text.files import checked_text
from fastkd.errors import UserError, some_of
from fastkd.types import IGNORE_INDEX

_NO_WORD = -1


@dataclass(frozen=True)
class TaggedTexts:
    """An `ExampleSource`: a split of a task whose words have classes, in the order of its file."""

    name: str
    """Task and split, for people."""
    words: list[tuple[str, ...]]
    labels: npt.NDArray[np.int64]
    """[words of all examples] their classes."""
    offsets: npt.NDArray[np.int64]
    """[examples + 1] where each example starts in `labels`."""
    regression: bool = False

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[Example]:
        for number, words in enumerate(self.words):
            first, end = self.offsets[number : number + 2]
            yield Example(words, self.labels[first:end].tolist())

    @cached_property
    def digest(self) -> str:
        """Digest of the content, the same wherever the split was read from."""
        content = hashlib.sha256(b"words" + self.labels.tobytes())
        for words in self.words:
            content.update(json.dumps(words).encode())
        return content.hexdigest()


@dataclass(frozen=True)
class EncodedWords(EncodedExamples):
    """Tokens of texts whose words have classes; `labels` are of tokens, `IGNORE_INDEX` where none
    is."""

    words: npt.NDArray[np.int32]
    """[tokens of all examples] which word of its example a labelled token is the first of; -1 of
    the others."""
    source: TaggedTexts

    def batch(self, rows: Sequence[int], multiple: int = PAD_MULTIPLE) -> Batch:
        batch = Sequences.batch(self, rows, multiple)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for place, row in enumerate(rows):
            first, end = self.offsets[row : row + 2]
            labels[place, : end - first] = torch.from_numpy(self.labels[first:end].astype(np.int64))
        return {**batch, "labels": labels}

    def of_words(self, found: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Classes of words, from those of tokens.

        Args:
            found: [tokens of all examples].

        Returns:
            [words of all examples]; -1 of a word that has no token, because its text was cut.
        """
        first = np.repeat(self.source.offsets[:-1], self.lengths)
        labelled = self.words != _NO_WORD
        classes = np.full(len(self.source.labels), -1, dtype=np.int64)
        classes[first[labelled] + self.words[labelled]] = found[labelled]
        return classes


@dataclass(frozen=True)
class WordForm:
    """A `Form` of texts whose words have classes."""

    source: TaggedTexts

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"labels_of": "words"}

    @property
    def files(self) -> Mapping[str, Beside]:
        return {"labels": Beside(np.int32, per_token=True), "words": Beside(np.int32, True)}

    def tokenise(
        self, chunk: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[Tokenised, Mapping[str, Iterable[float]]]:
        texts = [" ".join(example.texts) for example in chunk]
        encoded = frame(texts, None, tokenizer, max_length, return_offsets_mapping=True)
        words: list[int] = []
        labels: list[int] = []
        for example, offsets in zip(chunk, encoded["offset_mapping"], strict=True):
            found = first_tokens(example.texts, offsets)
            words += found
            labels += [IGNORE_INDEX if n == _NO_WORD else example.label[n] for n in found]
        return tokenised(encoded, tokenizer), {"labels": labels, "words": words}

    def opened(
        self, found: EncodedExamples, beside: Mapping[str, npt.NDArray[Any]]
    ) -> EncodedExamples:
        return EncodedWords(**vars(found), words=beside["words"], source=self.source)


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Which word each token is the first of, or -1.

    Args:
        words: that a text joins by single spaces.
        offsets: of its tokens in the text, first character and the one after the last; special
            tokens have none.
    """
    found = []
    word, begin = 0, 0
    for first, end in offsets:
        number = _NO_WORD
        if first < end:
            # what ended before has no token: the tokenizer leaves some characters out
            while word < len(words) and begin + len(words[word]) <= first:
                begin += len(words[word]) + 1
                word += 1
            if word < len(words) and end > begin:
                number = word
                begin += len(words[word]) + 1
                word += 1
        found.append(number)
    return found


def read_words(task: Task, source: str | Path, split: str, cache: str | Path) -> TaggedTexts:
    """Read a split of a task whose words have classes.

    Args:
        task: its text column holds lists of words, its label column as many classes.
        source: as `read_examples` takes it; files may be those of CoNLL, too (`SPLIT.conll`): a
            word a line, its class in the last column, an empty line between texts, columns split
            by TAB or by blanks.
        split: `task.train` or one of `task.evaluations`.
        cache: folder for what the hub sends.

    Raises:
        UserError: with file and line: no such split, no lists, another number of classes than
            words, or a class that the task does not have.
    """
    others = dict.fromkeys((".conll", ".conll.gz"), conll_rows)
    name, examples = read_split(task, source, split, cache, partial(_tagged, task), others)
    sizes = [len(words) for words, _ in examples]
    labels = [label for _, classes in examples for label in classes]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return TaggedTexts(name, [words for words, _ in examples], np.asarray(labels), offsets)


def _tagged(task: Task, row: Row) -> Example:
    column, label = task.columns.texts[0], task.columns.label
    words, classes = row.texts[0], row.label
    for name, given in ((column, words), (label, classes)):
        if not isinstance(given, list | tuple):
            raise UserError(
                f"{row.where}: column {name!r} holds {type(given).__name__}, expected a list with "
                "an entry a word; give JSON lines, Parquet, a datasets folder, or files of CoNLL"
            )
    assert isinstance(words, list | tuple) and isinstance(classes, list | tuple)
    if not words:
        raise UserError(f"{row.where}: column {column!r} has no words; remove the row")
    if len(words) != len(classes):
        raise UserError(
            f"{row.where}: {len(words)} words in {column!r}, but {len(classes)} classes in "
            f"{label!r}; expected one a word"
        )
    texts = tuple(checked_text(word, column, row.where) for word in words)
    return Example(texts, [_number(given, task, row) for given in classes])


def _number(given: object, task: Task, row: Row) -> int:
    """Which class of a task a cell names, by its spelling or its number."""
    spelled = spelling_of(given)
    if given is not None and spelled in task.numbers:
        return task.numbers[spelled]
    whole = isinstance(given, int) and not isinstance(given, bool)
    if whole and isinstance(given, int) and 0 <= given < len(task.labels):
        return given
    raise UserError(
        f"{row.where}: class {given!r} in column {task.columns.label!r}, expected one of "
        f"{some_of(task.labels)}, or its number"
    )
