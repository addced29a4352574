"""Mappings that name one teacher layer, or none, for each student layer once and for all."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

from fastkd.layer_map.base import (
    LayerMap,
    Link,
    Progress,
    uniform_targets,
)


class FixedMap(LayerMap):
    """A mapping given by one teacher layer for each student layer, 0 for none."""

    @abstractmethod
    def targets(self) -> list[int]:
        """The teacher layer of student layers 1 to N, 0 for none."""

    def links(self, moment: Progress) -> tuple[Link, ...]:
        """One link for each student layer that has a target."""
        return self._links

    @cached_property
    def _links(self) -> tuple[Link, ...]:
        return tuple(Link(s, (t,)) for s, t in enumerate(self.targets(), start=1) if t)


class UniformMap(FixedMap):
    """Layer i learns from round(i M / N) (TinyBERT, arXiv 1909.10351, section 4.5)."""

    def targets(self) -> list[int]:
        return uniform_targets(self.student_layers, self.teacher_layers)


class LastMap(FixedMap):
    """The teacher's top N layers (TinyBERT's "top", section 4.5)."""

    def targets(self) -> list[int]:
        below = self.teacher_layers - self.student_layers
        return [below + s for s in range(1, self.student_layers + 1)]


class FirstMap(FixedMap):
    """The teacher's bottom N layers (TinyBERT's "bottom", section 4.5)."""

    def targets(self) -> list[int]:
        return list(range(1, self.student_layers + 1))


class SkipMap(FixedMap):
    """Every floor(M / N)-th layer, the student's last one free (PKD-skip, arXiv 1908.09355)."""

    def targets(self) -> list[int]:
        stride = self.teacher_layers // self.student_layers
        return [stride * s for s in range(1, self.student_layers)] + [0]


class BelowLastMap(FixedMap):
    """The N - 1 layers below the teacher's last, the student's last free (PKD-last)."""

    def targets(self) -> list[int]:
        below = self.teacher_layers - self.student_layers
        return [below + s for s in range(1, self.student_layers)] + [0]


class FinalMap(FixedMap):
    """The last layer from the last, nothing else (MiniLM, arXiv 2002.10957, section 3.1)."""

    def targets(self) -> list[int]:
        return [0] * (self.student_layers - 1) + [self.teacher_layers]


@dataclass(frozen=True)
class ExplicitMap(FixedMap):
    """A list of one teacher layer for each student layer, 0 for none."""

    layers: tuple[int, ...] = field(default=())

    def targets(self) -> list[int]:
        return list(self.layers)
