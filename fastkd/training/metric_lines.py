"""Lines of metrics.jsonl: flat columns, called alike in the file and in every tracker.

A line says its `kind` (train, heldout, teacher), its `step` and the `time` it was written at;
every other column is the kind and the name of a value: `train/learning_rate`,
`train/losses/hidden/1-2`, `heldout/scores/dev/accuracy`. So one table holds all kinds beside each
other, over one axis of steps. Summaries and tables of scores want an evaluation as it was made, a
tree; `evaluation_of` puts it together again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

Line = dict[str, Any]
_HEAD = ("kind", "step", "time")
# by set, then by metric or class; below any other name all that follows is one name: `hidden/1-2`
_BY_SET = ("scores", "class_f1")


def make_line(kind: str, step: int, values: Mapping[str, Any]) -> Line:
    """A line, written now.

    Args:
        kind: train, heldout or teacher.
        step: that was made last.
        values: numbers, words and mappings of them, by name.
    """
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"kind": kind, "step": step, "time": time, **_flat(kind, values)}


def values_of(line: Line, section: str) -> dict[str, float]:
    """The values of a section of a line by name, as in `losses`."""
    start = f"{line['kind']}/{section}/"
    return {key.removeprefix(start): v for key, v in line.items() if key.startswith(start)}


def by_term(values: Mapping[str, float]) -> dict[str, float]:
    """The sums of a term's values, of values by label: the term, or `term/pair of layers`."""
    terms: dict[str, float] = {}
    for label, value in values.items():
        term = label.partition("/")[0]
        terms[term] = terms.get(term, 0.0) + value
    return terms


def evaluation_of(line: Line) -> dict[str, Any]:
    """The tree that a line was made of, without mappings that held nothing."""
    found: dict[str, Any] = {}
    for key, value in line.items():
        if key not in _HEAD:
            _put(found, key.partition("/")[2], value)
    return found


def numbers_of(line: Line) -> Iterator[tuple[str, float, int]]:
    """The numbers of a line for a tracker: name, value and step."""
    for key, value in line.items():
        if key not in _HEAD and isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value), line["step"]


def _flat(name: str, values: Mapping[str, Any]) -> Line:
    found: Line = {}
    for key, value in values.items():
        inner = f"{name}/{key}"
        found |= _flat(inner, value) if isinstance(value, Mapping) else {inner: value}
    return found


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    head, _, rest = name.partition("/")
    if not rest:
        tree[head] = value
        return
    inside = tree.setdefault(head, {})
    if head == "baseline":
        # what one answer to everything scores is an evaluation of its own
        _put(inside, rest, value)
    elif head in _BY_SET:
        of, _, rest = rest.partition("/")
        inside.setdefault(of, {})[rest] = value
    else:
        inside[rest] = value
