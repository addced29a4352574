"""Questions whose answers are a part of a text, as in SQuAD: read, and tokenised in windows.

A context that is too long is cut into several examples that overlap (Devlin et al., arXiv
1810.04805, section 4.2): each holds the whole question. The label of an example is the first and
the last token of the answer; of a window that does not hold it the first token of all.
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
from transformers import BatchEncoding, PreTrainedTokenizerBase

from fastkd.data.sequences import Tokenised, frame, tokenised
from fastkd.data.tasks.read import Example, read_split
from fastkd.data.tasks.rows import Row
from fastkd.data.tasks.task import Task
from fastkd.data.tasks.tokenized import Beside, EncodedExamples
from fastkd.data.text.files import checked_text
from fastkd.errors import UserError

NO_PLACE = -1
"""Stand-in for the characters of a token that is none of the context."""
Answers = tuple[tuple[str, int], ...]
"""Texts, and where each starts in the context, in characters; the first one is learned."""


@dataclass(frozen=True)
class Questions:
    """An `ExampleSource`: a split of questions, in the order of its file."""

    name: str
    """Task and split, for people."""
    texts: list[tuple[str, ...]]
    """Question and context."""
    answers: list[Answers]
    """Answers to each question, at least one."""
    regression: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Example]:
        for number, (texts, answers) in enumerate(zip(self.texts, self.answers, strict=True)):
            yield Example(texts, (number, *answers[0]))

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Classes of questions, of which there are none."""
        return np.empty(0, dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """Digest of the content, the same wherever the split was read from."""
        content = hashlib.sha256(b"questions")
        for row in zip(self.texts, self.answers, strict=True):
            content.update(json.dumps(row).encode())
        return content.hexdigest()


@dataclass(frozen=True)
class EncodedQuestions(EncodedExamples):
    """Tokens of questions with windows of their contexts; `labels` are [examples, 2], the first and
    the last token of the answer."""

    spans: npt.NDArray[np.int32]
    """[tokens of all examples, 2] first character in the context and the one after the last;
    `NO_PLACE` of tokens that are none of it."""
    questions: npt.NDArray[np.int64]
    """[examples] which question each belongs to."""
    source: Questions


@dataclass(frozen=True)
class QuestionForm:
    """A `Form` of questions with contexts."""

    source: Questions
    shared: int
    """Tokens that windows of one context have in common."""

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"labels_of": "spans", "shared": self.shared}

    @property
    def files(self) -> Mapping[str, Beside]:
        return {
            "labels": Beside(np.int64, width=2),
            "spans": Beside(np.int32, per_token=True, width=2),
            "questions": Beside(np.int64),
        }

    def tokenise(
        self, chunk: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[Tokenised, Mapping[str, Iterable[float]]]:
        questions, contexts = zip(*(example.texts for example in chunk), strict=True)
        self._check_room(chunk, tokenizer, max_length)
        encoded = frame(
            questions,
            contexts,
            tokenizer,
            max_length,
            truncation="only_second",
            stride=self.shared,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        labels: list[int] = []
        spans: list[int] = []
        numbers: list[int] = []
        for window, place in enumerate(encoded["overflow_to_sample_mapping"]):
            number, answer, start = chunk[place].label
            found = _spans_of(encoded, window)
            labels += label_of(found, start, start + len(answer))
            spans += found.flatten().tolist()
            numbers.append(number)
        beside = {"labels": labels, "spans": spans, "questions": numbers}
        # windows of a long context overflow, but nothing of it is lost
        return tokenised(encoded, tokenizer)._replace(cut=0), beside

    def opened(
        self, found: EncodedExamples, beside: Mapping[str, npt.NDArray[Any]]
    ) -> EncodedExamples:
        whole = {**vars(found), "labels": found.labels.reshape(-1, 2)}
        spans = beside["spans"].reshape(-1, 2)
        return EncodedQuestions(
            **whole, spans=spans, questions=beside["questions"], source=self.source
        )

    def _check_room(
        self, chunk: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        """See that every question leaves more room than what windows share.

        Raises:
            UserError: naming one that doesn't.
        """
        special = tokenizer.num_special_tokens_to_add(pair=True)
        texts = [example.texts[0] for example in chunk]
        taken = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for example, ids in zip(chunk, taken, strict=True):
            if max_length - special - len(ids) <= self.shared:
                raise UserError(
                    f"{self.source.name}: question {example.label[0] + 1} takes {len(ids)} of "
                    f"task.max_length={max_length} tokens, special ones {special}, and windows of "
                    f"its context share {self.shared}; give a larger task.max_length or a smaller "
                    "task.stride"
                )


def _spans_of(encoded: BatchEncoding, window: int) -> npt.NDArray[np.int64]:
    """Characters in the context of every token of a window, [tokens, 2]."""
    spans = np.asarray(encoded["offset_mapping"][window], dtype=np.int64).reshape(-1, 2)
    texts = encoded.sequence_ids(window)
    spans[[text != 1 for text in texts]] = NO_PLACE
    # a token without characters answers nothing
    spans[spans[:, 0] == spans[:, 1]] = NO_PLACE
    return spans


def label_of(spans: npt.NDArray[np.int64], start: int, end: int) -> list[int]:
    """First and last token of an answer.

    Args:
        spans: from `_spans_of`.
        start: first character of the answer.
        end: the one after its last.

    Returns:
        Two places; 0 and 0 where the window does not hold all of it.
    """
    inside = np.flatnonzero(spans[:, 0] != NO_PLACE)
    if not len(inside):
        return [0, 0]
    first, last = spans[inside, 0], spans[inside, 1]
    if first[0] > start or last[-1] < end:
        return [0, 0]
    touched = inside[(last > start) & (first < end)]
    return [int(touched[0]), int(touched[-1])] if len(touched) else [0, 0]


def read_questions(task: Task, source: str | Path, split: str, cache: str | Path) -> Questions:
    """Read a split of questions.

    Args:
        task: its text columns hold the question and its context, its label column
            `{"text": [...], "answer_start": [...]}` or a list of `{"text": ..., "answer_start":
            ...}`.
        source: as `read_examples` takes it.
        split: `task.train` or one of `task.evaluations`.
        cache: folder for what the hub sends.

    Raises:
        UserError: with file and line: no such split, no answer, or one that does not stand in the
            context where it should.
    """
    name, examples = read_split(task, source, split, cache, partial(_question, task))
    return Questions(name, [texts for texts, _ in examples], [label for _, label in examples])


def _question(task: Task, row: Row) -> Example:
    columns, label = task.columns.texts, task.columns.label
    question, context = (
        checked_text(text, name, row.where) for name, text in zip(columns, row.texts, strict=True)
    )
    answers = _answers(row.label, label, row.where)
    if not answers:
        raise UserError(
            f"{row.where}: column {label!r} has no answer, and questions without one are not "
            "learned; remove the row"
        )
    for text, start in answers:
        if start < 0 or context[start : start + len(text)] != text or not text.strip():
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise UserError(
                f"{row.where}: answer {text!r:.80} of column {label!r} is to start at character "
                f"{start} of {columns[1]!r}, where {there!r:.80} stands; mend answer_start"
            )
    return Example((question, context), answers)


def _answers(given: object, column: str, where: str) -> Answers:
    rows = given
    if isinstance(given, Mapping):
        columns = [given.get(name) for name in ("text", "answer_start")]
        lists = [column for column in columns if isinstance(column, list | tuple)]
        if len(lists) == 2 and len(lists[0]) == len(lists[1]):
            pairs = zip(*lists, strict=True)
            rows = [{"text": text, "answer_start": start} for text, start in pairs]
    if not isinstance(rows, list | tuple) or not all(map(_is_answer, rows)):
        raise UserError(
            f"{where}: column {column!r} holds {given!r:.80}, expected "
            '{"text": [...], "answer_start": [...]}, as SQuAD has it'
        )
    return tuple((row["text"], row["answer_start"]) for row in rows)


def _is_answer(row: object) -> bool:
    if not isinstance(row, Mapping):
        return False
    start = row.get("answer_start")
    whole = isinstance(start, int) and not isinstance(start, bool)
    return whole and isinstance(row.get("text"), str)
