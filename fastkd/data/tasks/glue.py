"""The tasks of GLUE (arXiv 1804.07461): files, columns, labels and official metrics of each.

Names and columns are those of the official TSV folders; classes are counted as the hub data set
`nyu-mll/glue` counts them, so that a model trained on one form scores the same on the other.
"""

from __future__ import annotations

from fastkd.data.tasks.task import Columns, Task
from fastkd.errors import UserError

_HUB_SPLITS = {
    "dev": "validation",
    "dev_matched": "validation_matched",
    "dev_mismatched": "validation_mismatched",
}
_SENTENCE = Columns(texts=("sentence",), label="label")
_PAIR = Columns(texts=("sentence1", "sentence2"), label="label")
_ENTAILMENT = ("entailment", "not_entailment")
_BINARY = ("0", "1")
_Meanings = tuple[tuple[str, ...], ...]
# of 0 and 1, as the hub data set names them and as models do
_ACCEPTABLE: _Meanings = (("unacceptable",), ("acceptable",))
_POSITIVE: _Meanings = (("negative", "neg"), ("positive", "pos"))
_EQUIVALENT: _Meanings = (
    ("not_equivalent", "not_paraphrase", "non_paraphrase"),
    ("equivalent", "paraphrase"),
)
_DUPLICATE: _Meanings = (
    ("not_duplicate", "not_paraphrase", "non_duplicate"),
    ("duplicate", "paraphrase"),
)
_ENTAILED: _Meanings = (("not_entailment",), ("entailment",))

_TASKS = (
    Task(
        name="CoLA",
        columns=_SENTENCE,
        labels=_BINARY,
        meanings=_ACCEPTABLE,
        metrics=("matthews",),
        header=("source", "label", "mark", "sentence"),
        hub_name="cola",
        hub_splits=_HUB_SPLITS,
    ),
    Task(
        name="SST-2",
        columns=_SENTENCE,
        labels=_BINARY,
        meanings=_POSITIVE,
        metrics=("accuracy",),
        hub_name="sst2",
        hub_splits=_HUB_SPLITS,
    ),
    Task(
        name="MRPC",
        columns=Columns(texts=("#1 String", "#2 String"), label="Quality"),
        labels=_BINARY,
        meanings=_EQUIVALENT,
        metrics=("f1", "accuracy"),
        hub_columns=_PAIR,
        hub_name="mrpc",
        hub_splits=_HUB_SPLITS,
    ),
    Task(
        name="QQP",
        columns=Columns(texts=("question1", "question2"), label="is_duplicate"),
        labels=_BINARY,
        meanings=_DUPLICATE,
        metrics=("f1", "accuracy"),
        hub_columns=Columns(texts=("question1", "question2"), label="label"),
        hub_name="qqp",
        hub_splits=_HUB_SPLITS,
        # the official train.tsv has a few rows cut short
        skip_broken_rows=True,
    ),
    Task(
        name="STS-B",
        columns=Columns(texts=("sentence1", "sentence2"), label="score"),
        bounds=(0.0, 5.0),
        metrics=("pearson", "spearman"),
        hub_columns=_PAIR,
        hub_name="stsb",
        hub_splits=_HUB_SPLITS,
    ),
    Task(
        name="MNLI",
        columns=Columns(texts=("sentence1", "sentence2"), label="gold_label"),
        labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        evaluations=("dev_matched", "dev_mismatched"),
        hub_columns=Columns(texts=("premise", "hypothesis"), label="label"),
        hub_name="mnli",
        hub_splits=_HUB_SPLITS,
    ),
    Task(
        name="QNLI",
        columns=Columns(texts=("question", "sentence"), label="label"),
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        hub_name="qnli",
        hub_splits=_HUB_SPLITS,
    ),
    Task(
        name="RTE",
        columns=_PAIR,
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        hub_name="rte",
        hub_splits=_HUB_SPLITS,
    ),
    Task(
        name="WNLI",
        columns=_PAIR,
        labels=_BINARY,
        meanings=_ENTAILED,
        metrics=("accuracy",),
        hub_name="wnli",
        hub_splits=_HUB_SPLITS,
    ),
)
GLUE: dict[str, Task] = {task.name: task for task in _TASKS}
"""Every task of GLUE that has labels, by its official name."""


def glue_task(name: str) -> Task:
    """A task of GLUE, by its name in any case, with or without the hyphen.

    Raises:
        UserError: there is none of this name.
    """
    for task in GLUE.values():
        if _plain(name) == _plain(task.name):
            return task
    raise UserError(f"task {name!r}: not in GLUE; expected one of {', '.join(GLUE)}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
