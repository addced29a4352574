"""The mapping that is drawn at random."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from fastkd.layer_map.base import (
    LayerMap,
    Link,
    Progress,
    uniform_targets,
)


@dataclass(frozen=True)
class RandomMap(LayerMap):
    """N distinct teacher layers in rising order, drawn anew (RAIL-KD, arXiv 2109.10164).

    A draw is a function of the seed and of the step or epoch alone: all ranks agree, and a resumed
    run draws what it would have drawn.
    """

    redraw: Literal["run", "epoch", "step"] = "epoch"
    seed: int = 0

    @property
    def teacher_depth(self) -> int:
        return max(self._draw(0)) if self.redraw == "run" else self.teacher_layers

    @property
    def moves(self) -> bool:
        return self.redraw != "run"

    def links(self, moment: Progress) -> tuple[Link, ...]:
        number = {"run": 0, "epoch": moment.epoch, "step": moment.step}[self.redraw]
        return tuple(Link(s, (t,)) for s, t in enumerate(self._draw(number), start=1))

    def labels(self) -> tuple[str, ...]:
        if self.redraw == "run":
            return super().labels()
        return tuple(f"{s}-*" for s in range(1, self.student_layers + 1))

    def sources(self) -> tuple[int, ...]:
        if self.redraw == "run":
            return tuple(self._draw(0))
        return tuple(uniform_targets(self.student_layers, self.teacher_layers))

    def rows(self) -> list[tuple[int, int | str | None]]:
        if self.redraw == "run":
            return super().rows()
        text = f"random, drawn every {self.redraw}"
        return [(s, text) for s in range(1, self.student_layers + 1)]

    def _draw(self, number: int) -> list[int]:
        # the layers with the smallest digests: no generator whose algorithm may change
        def digest(layer: int) -> bytes:
            return hashlib.sha256(f"{self.seed}/{number}/{layer}".encode()).digest()

        ranked = sorted(range(1, self.teacher_layers + 1), key=digest)
        return sorted(ranked[: self.student_layers])
