"""Mappings in which a student layer learns from several teacher layers."""

from __future__ import annotations

from dataclasses import dataclass

from fastkd.layer_map.base import (
    LayerMap,
    Link,
    Progress,
    blocks,
)
from fastkd.layer_map.sections import LayerWeights


class MeanTargetMap(LayerMap):
    """The teacher's layers in N blocks of neighbours; layer i learns from the mean of block i."""

    def links(self, moment: Progress) -> tuple[Link, ...]:
        cut = blocks(self.student_layers, self.teacher_layers)
        return tuple(Link(s, block) for s, block in enumerate(cut, start=1))


class MeanLossMap(LayerMap):
    """The teacher's layers in N blocks of neighbours; layer i has the mean of its losses against
    each layer of block i."""

    def links(self, moment: Progress) -> tuple[Link, ...]:
        cut = blocks(self.student_layers, self.teacher_layers)
        return tuple(
            Link(s, (t,), 1 / len(block)) for s, block in enumerate(cut, start=1) for t in block
        )

    def rows(self) -> list[tuple[int, int | str | None]]:
        cut = blocks(self.student_layers, self.teacher_layers)
        return [
            (s, block[0] if len(block) == 1 else f"{block[0]}..{block[-1]}, mean of losses")
            for s, block in enumerate(cut, start=1)
        ]


@dataclass(frozen=True)
class TransportMap(LayerMap):
    """Every pair of layers, weighted by an exact transport (BERT-EMD, arXiv 2010.06133).

        sum over pairs of f_ij loss_ij,    f the cheapest flow between the layers' weights

    Flows are those of the losses of the step before, the first ones those of a look at its own
    batch. Layer weights begin equal; with `cost` and `softmax` layers that are cheap to serve get
    more, once a step.
    """

    layer_weights: LayerWeights = "cost"
    temperature: float = 1.0
    total: float = 1.0

    def links(self, moment: Progress) -> tuple[Link, ...]:
        students, teachers = self.student_layers, self.teacher_layers
        even = self.total / (students * teachers)
        return tuple(
            Link(s, (t,), even) for s in range(1, students + 1) for t in range(1, teachers + 1)
        )

    def rows(self) -> list[tuple[int, int | str | None]]:
        text = f"1..{self.teacher_layers}, by transport"
        return [(s, text) for s in range(1, self.student_layers + 1)]


@dataclass(frozen=True)
class AttentionMap(LayerMap):
    """Every layer learns from a softmax mixture of the teacher's (ALP-KD, arXiv 2012.14022).

        target of a token = sum over layers l of a_l v_l,    a = softmax(<u, v_l> / temperature)

    u is the student's state, v_l the teacher's of layer l; the weights carry no gradient.
    """

    temperature: float = 1.0

    def links(self, moment: Progress) -> tuple[Link, ...]:
        every = tuple(range(1, self.teacher_layers + 1))
        return tuple(Link(s, every) for s in range(1, self.student_layers + 1))

    def describe(self, link: Link) -> str:
        return f"{link.teachers[0]}..{link.teachers[-1]}, by attention"
