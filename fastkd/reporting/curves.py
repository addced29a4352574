"""Panels of a run's report, made from the lines of its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.reporting.scores import headline_scores
from fastkd.reporting.svg import Line, Panel
from fastkd.training.metric_lines import Line as Record
from fastkd.training.metric_lines import by_term, evaluation_of, values_of

# more curves than these are told apart by the student's layer alone
_NAMED = 15
_FURTHER = {
    "sentence_cosine": "sentence embeddings, cosine to the teacher's",
    "perplexity": "perplexity",
    "pseudo_perplexity": "pseudo-perplexity of masked tokens",
}


def training_panels(records: Sequence[Record]) -> list[Panel]:
    """What the steps came to: losses, then how they were made."""
    if not records:
        return []
    steps = [record["step"] for record in records]
    total = Line("total", steps, [_value(record, "loss") for record in records], reference=True)
    adds = [by_term(values_of(record, "weighted")) for record in records]
    terms = _lines(steps, adds)
    weighted = Panel([*terms, total], "loss, and what each term adds to it", log=True, legend="")
    # what is no mean says so
    rate = _alone(records, "learning_rate", "learning rate, last step")
    norm = _alone(records, "gradient_norm", "norm of the gradient, last step", log=True)
    panels = [weighted, *loss_panels(records), rate, norm]
    speeds = dict.fromkeys(key for record in records for key in record if key.endswith("_second"))
    for key in speeds:
        name = key.partition("/")[2]
        panels.append(_alone(records, name, name.replace("_per_", " a ").replace("_", " ")))
    return panels


def heldout_panels(records: Sequence[Record]) -> list[Panel]:
    """What the evaluations came to, without scores."""
    if not records:
        return []
    panels = [_alone(records, "total", "total, weighted", log=True), *loss_panels(records)]
    for name, title in _FURTHER.items():
        # embeddings of other lengths have no cosine
        if any(record.get(f"{record['kind']}/{name}") is not None for record in records):
            panels.append(_alone(records, name, title))
    steps = [record["step"] for record in records]
    for line in _lines(steps, [values_of(record, "agreement") for record in records]):
        panels.append(Panel([line], f"student and teacher, {line.label.replace('_', ' ')}"))
    return panels


def loss_panels(records: Sequence[Record]) -> list[Panel]:
    """One panel a term, one line a pair of layers."""
    steps = [record["step"] for record in records]
    lines = _lines(steps, [values_of(record, "losses") for record in records])
    panels = []
    for term in dict.fromkeys(line.label.partition("/")[0] for line in lines):
        own = [line for line in lines if line.label.partition("/")[0] == term]
        several = len(own) > _NAMED
        pairs = [
            Line(pair, line.x, line.y, group=_student(pair) if several else None)
            for line in own
            for pair in [line.label.partition("/")[2]]
        ]
        # a term without layers is one line
        heading = "by student layer" if several else "student-teacher"
        legend = heading if pairs[0].label else None
        panels.append(Panel(pairs, term, log=True, legend=legend))
    return panels


def score_panels(records: Sequence[Record], teacher: Mapping[str, Any]) -> list[Panel]:
    """Scores over the run, beside the teacher's."""
    steps, taught = [record["step"] for record in records], headline_scores(teacher)
    panels = []
    for line in _lines(steps, [headline_scores(evaluation_of(record)) for record in records]):
        lines = [Line("student", line.x, line.y)]
        if line.label in taught:
            level = [taught[line.label]] * len(steps)
            lines.append(Line("teacher", steps, level, reference=True))
        panels.append(Panel(lines, line.label, legend=""))
    return panels


def last_weights(records: Sequence[Record]) -> dict[str, float]:
    """What each loss counted between the last two lines of the training, by label."""
    if not records:
        return {}
    raw, weighted = (values_of(records[-1], name) for name in ("losses", "weighted"))
    return {label: weighted[label] / raw[label] for label in weighted if raw.get(label)}


def _alone(records: Sequence[Record], name: str, title: str, *, log: bool = False) -> Panel:
    values = [_value(record, name) for record in records]
    return Panel([Line("", [record["step"] for record in records], values)], title, log=log)


def _lines(steps: Sequence[float], values: Sequence[Mapping[str, float]]) -> list[Line]:
    """A line for each name; stages may judge by other things."""
    names = dict.fromkeys(name for found in values for name in found)
    return [Line(n, steps, [found.get(n, math.nan) for found in values]) for n in names]


def _value(record: Record, name: str) -> float:
    value = record.get(f"{record['kind']}/{name}")
    return math.nan if value is None else float(value)


def _student(pair: str) -> str:
    return f"student layer {pair.partition('-')[0]}"
