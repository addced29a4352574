"""What every term of the objective is: which tensors it wants, and which losses it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastkd.capture import AttentionShape, Capture
from fastkd.layer_map import LayerMap, Link, Progress
from fastkd.losses.counts import Divisor
from fastkd.types import Head, Side


@dataclass(frozen=True)
class ModelPair:
    """What the objective must know of a student and its teacher, in this order."""

    widths: tuple[int, int]
    """Hidden sizes."""
    causal: bool = False
    """Whether attention sees earlier tokens only."""
    heads: tuple[int, int] = (1, 1)
    """Attention heads."""
    windows: tuple[Mapping[int, int], Mapping[int, int]] = field(default_factory=lambda: ({}, {}))
    """Of the layers with local attention: keys fewer than so many tokens away are seen."""
    head: Head = "none"
    """What stands on the blocks of both."""
    outputs: int = 2
    """Numbers that a classification head gives; 1 is a regression."""
    shapes: tuple[tuple[AttentionShape, ...], tuple[AttentionShape, ...]] = ((), ())
    """Of the queries, keys and values of each model's layers."""
    sinks: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    """Layers with attention sinks."""


@dataclass(frozen=True)
class Batch:
    """What one micro-batch left: captured tensors of both models, and what the data says."""

    student: Capture
    teacher: Capture
    mask: Tensor | None = None
    """Bool [batch, tokens], `None` where nothing is padded."""
    labels: Tensor | None = None
    """From `target_labels`."""


@dataclass(frozen=True)
class LossInfo:
    """One loss: the term of the recipe it belongs to, its name, and what it is a mean over.

    `group` is the part of a term that maps its own layers: the term itself, or one relation.
    """

    term: str
    group: str
    layers: str
    divisor: Divisor

    @property
    def mapped(self) -> bool:
        """Whether a layer map says what it compares."""
        return self.term in ("attention", "relations", "hidden")

    @property
    def label(self) -> str:
        """Name in metrics and tables."""
        return f"{self.group}/{self.layers}" if self.layers else self.group


class Term(nn.Module):
    """A loss of the objective, or several that share one call or one projection.

    `forward` takes a `Batch` and gives fp32 losses [matches], each a mean over its divisor within
    this micro-batch. Parameters belong to the term itself: ZeRO-3 gathers them for its `forward`.
    """

    matches: tuple[LossInfo, ...]

    def at(self, moment: Progress) -> None:
        """Move to a moment of the run; what does not change over time stays as it is."""

    def layers(self, side: Side) -> dict[str, set[int]]:
        """Layers of one model that `capture` must record now: of `attention` and of `hidden`."""
        raise NotImplementedError

    @property
    def wants_logits(self) -> bool:
        """Whether it reads the outputs of the heads."""
        return False


class AttentionMappedTerm(Term):
    """A term that reads the attention of the links of a layer map."""

    def __init__(self, layer_map: LayerMap) -> None:
        super().__init__()
        self.layer_map = layer_map
        self.at(Progress())

    def at(self, moment: Progress) -> None:
        self.links: tuple[Link, ...] = self.layer_map.links(moment)

    def layers(self, side: Side) -> dict[str, set[int]]:
        if side == "student":
            return {"attention": {link.student for link in self.links}}
        return {"attention": {t for link in self.links for t in link.teachers}}
