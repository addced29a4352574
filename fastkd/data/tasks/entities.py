"""Scores of classes of words: F1 of entities as CoNLL-2003 counts them, accuracy, F1 by class.

An entity is right where its first word, its last word and its type are (Tjong Kim Sang and De
Meulder, "Introduction to the CoNLL-2003 Shared Task", section 2.3). It begins at `B-TYPE`, and at
an `I-TYPE` that no word of its type stands before, as conlleval and seqeval have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.data.tasks.metrics import Judged, Scores
from fastkd.data.tasks.task import Task
from fastkd.data.tasks.token_outputs import TokenOutputs, first_metric, judged
from fastkd.data.tasks.words import EncodedWords, TaggedTexts
from fastkd.distributed import Ranks

_Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Entities:
    """Where entities stand among the words of all texts."""

    begins: npt.NDArray[np.bool_]
    """[words] whether one begins there."""
    ends: _Array
    """[words] behind the last word of the one that begins there."""
    types: _Array
    """[words] a number for its type."""


def find_entities(task: Task, classes: _Array, starts: npt.NDArray[np.bool_]) -> Entities:
    """The entities that classes of words name.

    Args:
        task: whose labels are `O`, `B-TYPE` and `I-TYPE`.
        classes: [words of all texts]; -1 is outside of entities.
        starts: [words] whether a text starts there.
    """
    kinds = entity_types(task)
    # of every label, and last of -1
    of_label = [kinds.index(label[2:]) if label != "O" else -1 for label in task.labels]
    types = np.asarray([*of_label, -1])[classes]
    begin = np.asarray([*(label.startswith("B-") for label in task.labels), False])[classes]
    before = np.concatenate([[-1], types[:-1]])
    inside = types >= 0
    begins = inside & (begin | starts | (before != types))
    edges = np.flatnonzero(begins | ~inside | starts)
    after = np.append(edges, len(classes))
    places = np.arange(len(classes))
    return Entities(begins, after[np.searchsorted(after, places, side="right")], types)


def entity_types(task: Task) -> list[str]:
    """What the entities of a task are called, in the order of its labels."""
    return list(dict.fromkeys(label[2:] for label in task.labels if label != "O"))


def measure_words(
    task: Task, predicted: _Array, right: _Array, offsets: _Array
) -> tuple[Scores, Scores]:
    """Every metric of the task, and the F1 of each of its types of entities, or its classes.

    Args:
        task: with classes of words.
        predicted: [words of all texts] classes; -1 where nothing was predicted.
        right: [words] classes.
        offsets: [texts + 1] where each text starts.
    """
    if not task.names_entities:
        counts = [(right == n, predicted == n) for n in range(len(task.labels))]
        by_class = [_f1(int((r & p).sum()), r, p) for r, p in counts]
        return _scores(task, predicted, right, None), dict(zip(task.labels, by_class, strict=True))
    found = _found(task, predicted, right, offsets)
    by_type = {}
    for number, name in enumerate(entity_types(task)):
        chosen = [of.begins & (of.types == number) for of in found[:2]]
        by_type[name] = _f1(int((found.matched & chosen[0]).sum()), *chosen)
    return _scores(task, predicted, right, found), by_type


class _Found(NamedTuple):
    """Entities of labels and of predictions, and where both begin the same one."""

    there: Entities
    said: Entities
    matched: npt.NDArray[np.bool_]


def _found(task: Task, predicted: _Array, right: _Array, offsets: _Array) -> _Found:
    starts = np.zeros(len(right), dtype=bool)
    starts[offsets[:-1]] = True
    there, said = (find_entities(task, of, starts) for of in (right, predicted))
    matched = there.begins & said.begins
    matched &= (there.ends == said.ends) & (there.types == said.types)
    return _Found(there, said, matched)


def _scores(task: Task, predicted: _Array, right: _Array, found: _Found | None) -> Scores:
    """Every metric of the task; what is found where it names entities."""
    values = {"token_accuracy": float((predicted == right).mean())}
    if found is not None:
        hits = int(found.matched.sum())
        values["entity_f1"] = _f1(hits, found.there.begins, found.said.begins)
    return {metric: values[metric] for metric in task.metrics}


def _constant_scores(task: Task, answer: int, words: TaggedTexts) -> Scores:
    """What one class for every word scores."""
    predicted, right = np.full_like(words.labels, answer), words.labels
    found = _found(task, predicted, right, words.offsets) if task.names_entities else None
    return _scores(task, predicted, right, found)


def _f1(hits: int, right: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_]) -> float:
    """0 where there is nothing to find and nothing was found."""
    return 2 * hits / max(int(right.sum() + predicted.sum()), 1)


class WordEvaluator:
    """An `Evaluator` of classes of words; a word whose text was cut before it counts as missed."""

    def __init__(
        self,
        task: Task,
        evaluations: Mapping[str, EncodedWords],
        device: torch.device,
        whose: Judged = "student",
    ) -> None:
        self._task, self._evaluations = task, evaluations
        self._classes = TokenOutputs(evaluations, device, whose, dtype=torch.int64)

    def add(self, rows: Tensor, student: Tensor, teacher: Tensor | None) -> None:
        self._classes.add(rows, student, student.argmax(dim=-1))

    def results(self, ranks: Ranks) -> dict[str, Any]:
        """`score`, the mean over sets of the first metric, `scores` of each set by metric,
        `examples`, and `baseline`, `class_f1` and `one_class` as a `ScoreEvaluator` has them."""
        scores: dict[str, Scores] = {}
        class_f1: dict[str, Scores] = {}
        one_class, count = {}, 0
        for name, examples, classes in self._classes.sets(ranks):
            predicted, source = examples.of_words(classes), examples.source
            found = measure_words(self._task, predicted, source.labels, source.offsets)
            scores[name], class_f1[name] = found
            if predicted[0] >= 0 and (predicted == predicted[0]).all():
                one_class[name] = self._task.labels[int(predicted[0])]
            count += len(examples)
        return {
            **judged(self._task, scores, count),
            "baseline": self._baseline(),
            "class_f1": class_f1,
            "one_class": one_class,
        }

    def _baseline(self) -> dict[str, Any]:
        """What the best one class for every word scores."""
        sources = {name: examples.source for name, examples in self._evaluations.items()}
        found = [
            {name: _constant_scores(self._task, answer, of) for name, of in sources.items()}
            for answer in range(self._task.outputs)
        ]
        best = max(found, key=lambda scores: first_metric(self._task, scores))
        return {"score": first_metric(self._task, best), "scores": best}
