"""What every mapping answers: which teacher layers each student layer learns from, and when.

Layers are numbered once, here, for the whole project: layer 0 is the embeddings (what enters the
first block), layer i is the output of block i. The attention of layer i is the attention inside
block i; layer 0 has none. A mapping is a pure function of the two depths, its options and the
moment, so that nothing of it has to be saved and all ranks agree.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

CONVENTION = "layer 0: embeddings; layer i: output of block i, and the attention inside it"


class Progress(NamedTuple):
    """Where a run stands: optimiser steps done and passes over the data done."""

    step: int = 0
    epoch: int = 0


class Link(NamedTuple):
    """One comparison of a mapping: a student layer, and what it learns from.

    Several `teachers` make one target, their mean unless the mapping is an `AttentionMap`;
    `weight` is the factor of the loss.
    """

    student: int
    teachers: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class LayerMap(ABC):
    """A mapping between a student of `student_layers` and a teacher of `teacher_layers` blocks."""

    student_layers: int
    teacher_layers: int

    @abstractmethod
    def links(self, moment: Progress) -> tuple[Link, ...]:
        """The links in force; their number and their student layers are always the same."""

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(student layer, teacher layer) of every link at the start, blends taken apart."""
        return tuple((link.student, t) for link in self.links(Progress()) for t in link.teachers)

    @property
    def teacher_depth(self) -> int:
        """The deepest teacher layer that may ever be matched."""
        return max(teacher for _, teacher in self.pairs)

    @property
    def moves(self) -> bool:
        """Whether the teacher layers of the links change over the run."""
        return False

    def labels(self) -> tuple[str, ...]:
        """A name for every link, the same at every moment: `2-6`, `2-4..6`."""
        return tuple(f"{link.student}-{_span(link.teachers)}" for link in self.links(Progress()))

    def sources(self) -> tuple[int, ...]:
        """The teacher layer that each student layer starts from: a single one that it learns
        from, else the uniform one."""
        found: dict[int, list[int]] = {}
        for student, teacher in self.pairs:
            found.setdefault(student, []).append(teacher)
        alone = {student: layers[0] for student, layers in found.items() if len(layers) == 1}
        spread = uniform_targets(self.student_layers, self.teacher_layers)
        return tuple(alone.get(s, spread[s - 1]) for s in range(1, self.student_layers + 1))

    def rows(self) -> list[tuple[int, int | str | None]]:
        """One row a student layer with what it learns from, `None` for nothing; for printing."""
        found: dict[int, int | str] = {}
        for link in self.links(Progress()):
            one = len(link.teachers) == 1
            found[link.student] = link.teachers[0] if one else self.describe(link)
        return [(s, found.get(s)) for s in range(1, self.student_layers + 1)]

    def describe(self, link: Link) -> str:
        """What a link with several teacher layers is, in the printed table."""
        return f"mean of {_span(link.teachers)}"


def uniform_targets(student: int, teacher: int) -> list[int]:
    """round(i M / N) for i in 1..N."""
    # rounding half up in integers, so that no float decides a tie
    return [(2 * s * teacher + student) // (2 * student) for s in range(1, student + 1)]


def blocks(student: int, teacher: int) -> list[tuple[int, ...]]:
    """The teacher's layers cut into one run of neighbours for each student layer."""
    ends = [0, *uniform_targets(student, teacher)]
    return [tuple(range(a + 1, b + 1)) for a, b in itertools.pairwise(ends)]


def _span(layers: tuple[int, ...]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
