"""What a task is: where its texts and labels stand, what the labels mean, how it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from fastkd.data.tasks.metrics import Metric
from fastkd.errors import UserError

_CORRELATIONS: tuple[Metric, ...] = ("pearson", "spearman")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns that are read, of one text or of a pair."""

    texts: tuple[str, ...]
    """One column, or two."""
    label: str
    """Class or score."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification of texts or pairs of texts, or a regression on them.

    Raises:
        UserError: parts that contradict each other.
    """

    name: str
    """Its folder's name where a folder holds several tasks."""
    columns: Columns
    """In files."""
    labels: tuple[str, ...] = ()
    """Every label as the files spell it, class 0 first; empty for a regression."""
    meanings: tuple[tuple[str, ...], ...] = ()
    """Of every label the names that models and data sets give it, where its spelling does not say;
    empty where it does."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest score of a regression; `None` for a classification."""
    metrics: tuple[Metric, ...] = ()
    """The official ones; accuracy, or both correlations, where not given."""
    header: tuple[str, ...] | None = None
    """Columns of a TSV file without a header line."""
    train: str = "train"
    """Split that is trained on: the file's name without its ending."""
    evaluations: tuple[str, ...] = ("dev",)
    """Splits that the task is scored on."""
    hub_columns: Columns | None = None
    """In `datasets` form, where they have other names."""
    hub_name: str | None = None
    """Configuration of the hub data set, as in `nyu-mll/glue`; the task's name where not given."""
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    """Names of splits in `datasets` form, where they differ."""
    skip_broken_rows: bool = False
    """Leave rows out, with a warning, that lack columns or text: official files may hold some."""

    def __post_init__(self) -> None:
        if not self.metrics:
            default = _CORRELATIONS if self.regression else ("accuracy",)
            object.__setattr__(self, "metrics", default)
        for problem in self._problems():
            raise UserError(f"task {self.name}: {problem}")

    @property
    def regression(self) -> bool:
        """Whether labels are scores."""
        return self.bounds is not None

    @property
    def outputs(self) -> int:
        """Numbers that a model of the task gives an example: its classes, or one score."""
        return 1 if self.regression else len(self.labels)

    @property
    def spellings(self) -> tuple[tuple[str, ...], ...]:
        """Of every label its own name and what it is called elsewhere."""
        meanings = self.meanings or ((),) * len(self.labels)
        pairs = zip(self.labels, meanings, strict=True)
        return tuple((label, *meaning) for label, meaning in pairs)

    def _problems(self) -> list[str]:
        found = []
        if len(self.columns.texts) not in (1, 2):
            found.append(f"{len(self.columns.texts)} text columns given, expected one or two")
        if self.regression and self.labels:
            found.append("labels and bounds given, expected one: classes or a score's range")
        if not self.regression and len(set(self.labels)) < 2:
            found.append(f"labels {self.labels} given, expected two different ones at least")
        if len(set(self.labels)) < len(self.labels):
            found.append(f"labels {self.labels} hold one twice, expected each once")
        if self.meanings and len(self.meanings) != len(self.labels):
            found.append(
                f"{len(self.meanings)} meanings given for {len(self.labels)} labels, expected one "
                "for each"
            )
        if self.bounds and not self.bounds[0] < self.bounds[1]:
            found.append(f"bounds {self.bounds} given, expected the smaller score first")
        unknown = set(self.metrics) - set(get_args(Metric))
        if unknown:
            found.append(f"metrics {sorted(unknown)} unknown, expected some of {get_args(Metric)}")
        elif any((metric in _CORRELATIONS) != self.regression for metric in self.metrics):
            kind = "a regression" if self.regression else "a classification"
            found.append(f"metrics {self.metrics} given, which do not all score {kind}")
        if "f1" in self.metrics and len(self.labels) != 2:
            found.append(f"f1 scores two classes, but there are {len(self.labels)}; leave it out")
        return found
