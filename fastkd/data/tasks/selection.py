"""Examples of the train split that stay out of training: a recipe is chosen by them, not by dev.

The text of an example decides, the first one of a pair, as it does of rows of text
(`data.text.split`): the same examples whatever their order, the form of the files and the seed, and
no premise or question on both sides. A pair of texts could be hashed whole; then a premise with
three hypotheses, as MNLI has them, would be trained on and scored.
"""

from __future__ import annotations

import numpy as np

from fastkd.data.tasks.read import Examples
from fastkd.data.text.split import content_hash, is_held_out
from fastkd.errors import UserError

SELECTION = "selection"
"""What the set is called where scores of several sets are."""


def split_off(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """The examples that are trained on, and the share of them that is not, each in its order.

    Args:
        examples: the whole split.
        share: of all texts there may be, between 0 and 1.

    Raises:
        UserError: nothing is left to train on, or a part that compares nothing: it has no examples,
            or one label for all.
    """
    chosen = np.array([is_held_out(texts[0], share) for texts in examples.texts])
    part = _taken(examples, chosen, f"{examples.name} {SELECTION}")
    given = f"task.selection.share is {share:g}, which takes"
    if len(part) == len(examples):
        raise UserError(
            f"{given} all {len(examples):,} examples of {examples.name}, so there are none to "
            "train on; give a smaller share"
        )
    if len(np.unique(part.labels)) < 2:
        held = "that all have one label" if len(part) else "so there is nothing to score"
        raise UserError(
            f"{given} {len(part):,} of {len(examples):,} examples of {examples.name}, {held}; give "
            "a larger share, or leave task.selection out"
        )
    return _taken(examples, ~chosen, examples.name), part


def first_of(examples: Examples, count: int) -> Examples:
    """So many examples, in the order of the file; all where there are no more.

    Raises:
        UserError: of a classification, they all have one label.
    """
    places = sorted(range(len(examples)), key=lambda n: content_hash("\0".join(examples.texts[n])))
    chosen = np.zeros(len(examples), dtype=bool)
    chosen[places[:count]] = True
    part = _taken(examples, chosen, examples.name)
    if len(np.unique(part.labels)) < 2:
        raise UserError(
            f"task.examples is {count}, which takes {len(part)} of {examples.name} that all have "
            "one label; give more"
        )
    return part


def _taken(examples: Examples, chosen: np.ndarray, name: str) -> Examples:
    numbers = np.flatnonzero(chosen)
    return Examples(name, [examples.texts[n] for n in numbers], examples.labels[numbers])
