"""The two measures of a comparison, and how each is shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastkd.layer_similarity.cka import Matrix
from fastkd.layer_similarity.compare import Similarity


@dataclass(frozen=True)
class View:
    """One of the two measures, and how it is shown."""

    name: str
    values: Matrix
    first: int
    """Layer of the first row and column."""
    title: str
    form: str
    high: bool
    """Whether more is more alike."""

    def best(self, line: Matrix) -> int | None:
        """The column of the most similar layer, `None` where none can be compared."""
        if not np.isfinite(line).any():
            return None
        return int(np.nanargmax(line) if self.high else np.nanargmin(line))


def views(similarity: Similarity) -> tuple[View, View]:
    """CKA of hidden states and divergence of attention."""
    kind = similarity.kind
    bound = ", at most 0.693" if kind == "js" else ""
    return (
        View("cka", similarity.cka, 0, "linear CKA of hidden states (1: alike)", "{:.3f}", True),
        View(
            "attention",
            similarity.divergence,
            1,
            f"{kind} divergence of attention (0: alike{bound})",
            "{:.3f}",
            False,
        ),
    )
