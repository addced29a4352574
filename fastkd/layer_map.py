"""Which teacher layer each student layer learns from.

Layers are numbered once, here, for the whole project: layer 0 is the embeddings (what enters the
first block), layer i is the output of block i. The attention of layer i is the attention inside
block i; layer 0 has none. A mapping is a pure function of the two depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastkd.errors import UserError

MapKind = Literal["uniform", "last", "first", "skip"]
CONVENTION = "layer 0: embeddings; layer i: output of block i, and the attention inside it"


@dataclass(frozen=True)
class LayerMap:
    """The mapping in force: `pairs` of (student layer, teacher layer), both from 1."""

    pairs: tuple[tuple[int, int], ...]
    student_layers: int
    teacher_layers: int

    @property
    def teacher_depth(self) -> int:
        """The deepest teacher layer that is matched."""
        return max(teacher for _, teacher in self.pairs)

    def sources(self) -> tuple[int, ...]:
        """The teacher layer that each student layer starts from: its own, else the uniform one."""
        mapped = dict(self.pairs)
        spread = _uniform(self.student_layers, self.teacher_layers)
        return tuple(mapped.get(s, spread[s - 1]) for s in range(1, self.student_layers + 1))

    def rows(self) -> list[tuple[int, int | None]]:
        """One row a student layer, with `None` where nothing is matched; for printing."""
        mapped = dict(self.pairs)
        return [(s, mapped.get(s)) for s in range(1, self.student_layers + 1)]


def make_layer_map(
    kind: MapKind | Sequence[int], student_layers: int, teacher_layers: int
) -> LayerMap:
    """Build the mapping for a student of N blocks and a teacher of M.

    Kinds: `uniform` maps i to round(i M / N); `last` to the top N blocks, `first` to the bottom N
    (the three strategies of TinyBERT, arXiv 1909.10351, section 4.5); `skip` takes every
    floor(M / N)-th block and leaves the student's last block free (PKD-skip, arXiv 1908.09355,
    section 3). A sequence names one teacher layer for each student layer, 0 for none.

    Raises:
        UserError: a student deeper than its teacher, a sequence of another length than the student,
            or a layer that the teacher doesn't have.
    """
    if student_layers > teacher_layers:
        raise UserError(
            f"student.layers is {student_layers}, but the teacher has {teacher_layers} layers; "
            "give a student that is not deeper"
        )
    targets = _targets(kind, student_layers, teacher_layers)
    if len(targets) != student_layers:
        raise UserError(
            f"layer_map names {len(targets)} teacher layers, but student.layers is "
            f"{student_layers}; give one for each student layer, 0 for none"
        )
    for student, teacher in enumerate(targets, start=1):
        if not 0 <= teacher <= teacher_layers:
            raise UserError(
                f"layer_map sends student layer {student} to teacher layer {teacher}, but the "
                f"teacher's layers are 1 to {teacher_layers}; 0 is for none"
            )
    pairs = tuple((s, t) for s, t in enumerate(targets, start=1) if t)
    if not pairs:
        raise UserError(
            f"layer_map {kind} matches no layer of a {student_layers}-layer student and a "
            f"{teacher_layers}-layer teacher; give at least one pair"
        )
    return LayerMap(pairs, student_layers, teacher_layers)


def _targets(kind: MapKind | Sequence[int], student: int, teacher: int) -> list[int]:
    if not isinstance(kind, str):
        return list(kind)
    if kind == "uniform":
        return _uniform(student, teacher)
    if kind == "last":
        return [teacher - student + s for s in range(1, student + 1)]
    if kind == "first":
        return list(range(1, student + 1))
    stride = teacher // student
    return [stride * s for s in range(1, student)] + [0]


def _uniform(student: int, teacher: int) -> list[int]:
    # rounding half up in integers, so that no float decides a tie
    return [(2 * s * teacher + student) // (2 * student) for s in range(1, student + 1)]
