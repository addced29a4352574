"""Scores of answers: exact match and F1 of words, as SQuAD has them.

An answer is the span of the context with the largest sum of both logits, over all windows of the
context, of at most 30 tokens (Devlin et al., arXiv 1810.04805, section 4.2 and its code). Both
metrics compare it with the nearest of the right answers, in small letters, without punctuation and
articles (Rajpurkar et al., arXiv 1606.05250, section 6.1 and its evaluation).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.data.tasks.metrics import Judged, Scores
from fastkd.data.tasks.questions import NO_PLACE, EncodedQuestions
from fastkd.data.tasks.task import Task
from fastkd.data.tasks.token_outputs import TokenOutputs, judged
from fastkd.distributed import Ranks

LONGEST_ANSWER = 30
"""Tokens."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> list[str]:
    """The words of an answer that count."""
    plain = text.lower().translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split()


def exact_match(found: str, right: str) -> float:
    """1 where the words are the same, else 0."""
    return float(normalised(found) == normalised(right))


def answer_f1(found: str, right: str) -> float:
    """F1 of the words that both have."""
    words = Counter(normalised(found)), Counter(normalised(right))
    shared = sum((words[0] & words[1]).values())
    if not words[0] or not words[1]:
        return float(words[0] == words[1])
    return 2 * shared / (sum(words[0].values()) + sum(words[1].values()))


def measure_answers(task: Task, found: Sequence[str], right: Sequence[Sequence[str]]) -> Scores:
    """Every metric of the task, means over the questions.

    Args:
        task: of questions.
        found: an answer to each.
        right: the answers that count as right, of each.
    """
    metrics = {"exact_match": exact_match, "answer_f1": answer_f1}
    pairs = list(zip(found, right, strict=True))
    return {
        name: fmean(max(metrics[name](text, other) for other in rights) for text, rights in pairs)
        for name in task.metrics
    }


def best_span(
    start: npt.NDArray[np.float32], end: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_]
) -> tuple[float, int, int]:
    """The best span of a window: the sum of its logits, its first and its last token.

    Args:
        start: [tokens] logits of first tokens.
        end: [tokens] logits of last tokens.
        allowed: [tokens] which may be either; at least one.
    """
    start, end = (np.where(allowed, logits, -np.inf) for logits in (start, end))
    best = -np.inf, 0, 0
    for more in range(min(LONGEST_ANSWER, len(start))):
        sums = start[: len(start) - more] + end[more:]
        place = int(sums.argmax())
        if sums[place] > best[0]:
            best = float(sums[place]), place, place + more
    return best


def answers_of(examples: EncodedQuestions, logits: npt.NDArray[np.float32]) -> list[str]:
    """The answer to every question.

    Args:
        examples: windows of all questions.
        logits: [tokens of all windows, 2] of first and of last tokens.
    """
    best = [(-np.inf, "")] * len(examples.source)
    for window, number in enumerate(examples.questions.tolist()):
        first, end = examples.offsets[window : window + 2]
        spans = examples.spans[first:end]
        allowed = spans[:, 0] != NO_PLACE
        if not allowed.any():
            continue
        score, begin, last = best_span(logits[first:end, 0], logits[first:end, 1], allowed)
        if score > best[number][0]:
            context = examples.source.texts[number][1]
            best[number] = score, context[spans[begin, 0] : spans[last, 1]]
    return [text for _, text in best]


class AnswerEvaluator:
    """An `Evaluator` of answers."""

    def __init__(
        self,
        task: Task,
        evaluations: Mapping[str, EncodedQuestions],
        device: torch.device,
        whose: Judged = "student",
    ) -> None:
        self._task = task
        self._logits = TokenOutputs(evaluations, device, whose, shape=(2,), dtype=torch.float32)

    def add(self, rows: Tensor, student: Tensor, teacher: Tensor | None) -> None:
        self._logits.add(rows, student, student)

    def results(self, ranks: Ranks) -> dict[str, Any]:
        """`score`, the mean over sets of the first metric, `scores` of each set by metric,
        `examples`, which are questions."""
        scores, count = {}, 0
        for name, examples, logits in self._logits.sets(ranks):
            found = answers_of(examples, logits)
            right = [[text for text, _ in answers] for answers in examples.source.answers]
            scores[name] = measure_answers(self._task, found, right)
            count += len(found)
        return judged(self._task, scores, count)
