"""The mapping that names its pairs one by one."""

from __future__ import annotations

from dataclasses import dataclass

from fastkd.layer_map.base import LayerMap, Link, Progress


@dataclass(frozen=True)
class PairsMap(LayerMap):
    """Pairs of a student and a teacher layer with a weight each; a layer may stand in several.

    `layer_map: [[1, 2], [3, 6, 0.5]]` compares layers 1 and 2, and layers 3 and 6 at half weight.
    """

    layers: tuple[tuple[int, int, float], ...] = ()

    def links(self, moment: Progress) -> tuple[Link, ...]:
        return tuple(Link(student, (teacher,), weight) for student, teacher, weight in self.layers)

    def rows(self) -> list[tuple[int, int | str | None]]:
        found: dict[int, list[str]] = {}
        for student, teacher, weight in self.layers:
            factor = "" if weight == 1.0 else f" (weight {weight:g})"
            found.setdefault(student, []).append(f"{teacher}{factor}")
        said = {student: ", ".join(teachers) for student, teachers in found.items()}
        return [(s, said.get(s)) for s in range(1, self.student_layers + 1)]
