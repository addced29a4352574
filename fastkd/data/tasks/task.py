"""What a task is: where its texts and labels stand, what the labels mean, how it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import get_args

from fastkd.errors import UserError, some_of
from fastkd.head_spec import HEADS, TASK_HEAD, Labels
from fastkd.types import LARGEST_SCORE, Metric, TaskKind

_CORRELATIONS: tuple[Metric, ...] = ("pearson", "spearman")
_METRICS: dict[Labels | None, tuple[Metric, ...]] = {
    "example": ("matthews", "accuracy", "f1", *_CORRELATIONS),
    "token": ("entity_f1", "token_accuracy"),
    "span": ("answer_f1", "exact_match"),
}
"""By what a label is of."""
_SCORED: dict[Labels | None, str] = {"example": "texts", "token": "words", "span": "answers"}
_TEXTS: dict[Labels | None, tuple[str, tuple[int, ...]]] = {
    "example": ("one or two", (1, 2)),
    "token": ("one, of the words", (1,)),
    "span": ("two, of the question and its context", (2,)),
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns that are read, of one text or of a pair."""

    texts: tuple[str, ...]
    """One column, or two."""
    label: str
    """Class or score."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification of texts or pairs of texts, a regression on them, a classification of the
    words of texts, or answers to questions that stand in a text.

    Raises:
        UserError: parts that contradict each other.
    """

    name: str
    """Its folder's name where a folder holds several tasks."""
    columns: Columns
    """Columns in files."""
    kind: TaskKind = TASK_HEAD
    """What is asked of a model."""
    labels: tuple[str, ...] = ()
    """Every label as the files spell it, class 0 first; empty for a regression."""
    meanings: tuple[tuple[str, ...], ...] = ()
    """Names that models and data sets give to every label, where its spelling does not say; empty
    where it does."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest score of a regression; `None` for a classification."""
    metrics: tuple[Metric, ...] = ()
    """The official ones; where not given accuracy, both correlations, of words the F1 of entities,
    if labels name these, and the accuracy, of answers F1 and exact match."""
    header: tuple[str, ...] | None = None
    """Columns of a TSV file without a header line."""
    train: str = "train"
    """Split that is trained on: the file's name without its ending."""
    evaluations: tuple[str, ...] = ("dev",)
    """Splits that the task is scored on."""
    hub_columns: Columns | None = None
    """Columns in `datasets` form, where they have other names."""
    hub_name: str | None = None
    """Configuration of the hub data set, as in `nyu-mll/glue`; the task's name where not given."""
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    """Names of splits in `datasets` form, where they differ."""
    skip_broken_rows: bool = False
    """Leave rows out, with a warning, that lack columns or text: official files may hold some."""

    def __post_init__(self) -> None:
        if not self.metrics:
            object.__setattr__(self, "metrics", self._default_metrics())
        for problem in self._problems():
            raise UserError(f"task {self.name}: {problem}")

    @property
    def regression(self) -> bool:
        """Whether labels are scores."""
        return self.bounds is not None

    @property
    def labels_of(self) -> Labels | None:
        """What a label is of."""
        return HEADS[self.kind].labels

    @property
    def names_entities(self) -> bool:
        """Whether labels are those of words in entities: `O`, and `B-TYPE` or `I-TYPE`."""
        named = [label for label in self.labels if label != "O"]
        return bool(named) and all(label[:2] in ("B-", "I-") and label[2:] for label in named)

    @property
    def outputs(self) -> int:
        """Numbers that a model of the task gives an example, or a token: its classes, one score, or
        whether an answer begins and ends there."""
        if self.labels_of == "span":
            return 2
        return 1 if self.regression else len(self.labels)

    @property
    def spellings(self) -> tuple[tuple[str, ...], ...]:
        """Names of every label: its own, and what it is called elsewhere."""
        meanings = self.meanings or ((),) * len(self.labels)
        pairs = zip(self.labels, meanings, strict=True)
        return tuple((label, *meaning) for label, meaning in pairs)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of every label."""
        return {label: number for number, label in enumerate(self.labels)}

    def _default_metrics(self) -> tuple[Metric, ...]:
        if self.labels_of == "example":
            return _CORRELATIONS if self.regression else ("accuracy",)
        of_kind = _METRICS[self.labels_of]
        named = self.labels_of != "token" or self.names_entities
        return of_kind if named else ("token_accuracy",)

    def _problems(self) -> list[str]:
        found = []
        expected, counts = _TEXTS[self.labels_of]
        if len(self.columns.texts) not in counts:
            found.append(f"{len(self.columns.texts)} text columns given, expected {expected}")
        return [*found, *self._wrong_labels(), *self._wrong_metrics()]

    def _wrong_labels(self) -> list[str]:
        found = []
        if self.labels_of == "span":
            given = self.labels or self.meanings or self.bounds
            return ["labels, meanings or bounds given, but answers have none"] if given else []
        if self.labels_of == "token" and self.bounds:
            found.append("bounds given, but words have classes; give labels in their place")
        if self.regression and self.labels:
            found.append("labels and bounds given, expected one: classes or a score's range")
        if not self.regression and len(set(self.labels)) < 2:
            found.append(f"labels {self.labels} given, expected two different ones at least")
        if len(set(self.labels)) < len(self.labels):
            found.append(f"labels {some_of(self.labels)} hold one twice, expected each once")
        if self.meanings and len(self.meanings) != len(self.labels):
            found.append(
                f"{len(self.meanings)} meanings given for {len(self.labels)} labels, expected one "
                "for each"
            )
        if self.bounds and not self.bounds[0] < self.bounds[1]:
            found.append(f"bounds {self.bounds} given, expected the smaller score first")
        if self.bounds and not all(abs(bound) <= LARGEST_SCORE for bound in self.bounds):
            found.append(
                f"bounds {self.bounds} given, expected scores of at most {LARGEST_SCORE:.4g}, as "
                "fp32 holds them"
            )
        return found

    def _wrong_metrics(self) -> list[str]:
        found = []
        unknown = set(self.metrics) - set(get_args(Metric))
        if unknown:
            found.append(f"metrics {sorted(unknown)} unknown, expected some of {get_args(Metric)}")
        elif not set(self.metrics) <= set(_METRICS[self.labels_of]):
            scored = _SCORED[self.labels_of]
            found.append(f"metrics {self.metrics} given, which do not all score {scored}")
        elif any((metric in _CORRELATIONS) != self.regression for metric in self.metrics):
            kind = "a regression" if self.regression else "a classification"
            found.append(f"metrics {self.metrics} given, which do not all score {kind}")
        if "f1" in self.metrics and len(self.labels) != 2:
            found.append(f"f1 scores two classes, but there are {len(self.labels)}; leave it out")
        if "entity_f1" in self.metrics and not self.names_entities:
            found.append(
                f"entity_f1 scores entities, but labels are {some_of(self.labels)}; expected O, "
                "and B-TYPE or I-TYPE, or leave it out"
            )
        return found
