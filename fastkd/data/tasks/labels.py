"""Which class of a task a name means: a model's outputs and a data set's classes carry names.

Names are compared without case and without what separates their words, so `NOT_ENTAILMENT`,
`not-entailment` and `Not Entailment` are one name. Names that say no more than a number, as
`LABEL_0` does, mean the class of that number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from fastkd.data.tasks.task import Task
from fastkd.errors import some_of

# beside a letter only: -1 and 1, 1-2 and 12 are different names
_SEPARATORS = re.compile(r"[\s_-]+(?=[^\W\d_])|(?<=[^\W\d_])[\s_-]+")


def same_name(name: str) -> str:
    """A name as it is compared: two that mean the same are equal."""
    return _SEPARATORS.sub("", name.strip().casefold())


def order_of(names: Sequence[str], task: Task) -> tuple[int, ...] | None:
    """Where each class of a task stands among names.

    Returns:
        Of every class its place in `names`; `None` where the names are not those of the task's
        labels or of their meanings, each once.
    """
    for spell in (str, same_name):
        order = _order(names, task, spell)
        if order is not None:
            return order
    return None


def is_generic(names: Sequence[str]) -> bool:
    """Whether every name is but its number: `LABEL_0`, `LABEL_1`... or `0`, `1`..."""
    return all(
        same_name(name) in (f"label{number}", str(number)) for number, name in enumerate(names)
    )


def are_numbers(task: Task) -> bool:
    """Whether a task's labels are the numbers from 0 on, in any order."""
    return set(task.labels) == {str(number) for number in range(len(task.labels))}


def described(task: Task) -> str:
    """The labels of a task with their meanings, for people."""
    if not task.meanings:
        return some_of(task.labels)
    pairs = zip(task.labels, task.meanings, strict=True)
    return some_of([f"{label} ({meaning[0]})" for label, meaning in pairs])


def _order(names: Sequence[str], task: Task, spell: Callable[[str], str]) -> tuple[int, ...] | None:
    found = {spell(name): place for place, name in enumerate(names)}
    # two labels that are spelled alike can't be told apart
    spelled = [{spell(word) for word in words} for words in task.spellings]
    apart = sum(map(len, spelled)) == len(set().union(*spelled))
    if not apart or len(found) < len(names) or len(names) != len(task.labels):
        return None
    places = [[found[word] for word in words if word in found] for words in spelled]
    return tuple(place[0] for place in places) if all(len(p) == 1 for p in places) else None
