"""What every loss is: its section of a recipe, what it captures, what it is a mean over, its value.

A loss is a class in one file (`fastkd.losses` names them). One that computes itself gives a
`forward`; losses that share an op call or a projection name a `LossGroup`, which computes all of
its members together. Either is a `Term`, a module of the objective.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from fastkd.head_spec import HEADS
from fastkd.layer_map import LayerMap, Link, Progress, checked_links
from fastkd.losses.counts import Divisor, Reduction
from fastkd.losses.ensemble import Ensemble
from fastkd.losses.gathering import Gather, alone
from fastkd.losses.pooling import EmbeddingModules
from fastkd.packed_row import PackedRow
from fastkd.recipe.weights import LossConfig as LossConfig
from fastkd.row_form import RowForm
from fastkd.types import IGNORE_INDEX, Head, Side

if TYPE_CHECKING:
    # a recipe is read without loading transformers
    from fastkd.capture import AttentionShape, AttentionTraits, Capture

Projection = Literal["auto", "none", "shared", "per_pair"]


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
    """Windows of the layers with local attention: keys fewer than so many tokens away are seen."""
    head: Head = "none"
    """What stands on the blocks of both."""
    outputs: int = 2
    """Numbers that a classification head gives; 1 is a regression."""
    no_classes: tuple[str | None, str | None] = (None, None)
    """What each model's `problem_type` is, where it says of a head for texts that its numbers are
    not classes of which one is right."""
    shapes: tuple[tuple[AttentionShape, ...], tuple[AttentionShape, ...]] = ((), ())
    """Shapes of the queries, keys and values of each model's layers."""
    sinks: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    """Layers with attention sinks."""
    embeddings: tuple[EmbeddingModules, EmbeddingModules] | None = None
    """What makes an embedding of each model's final states: the student's where nothing is
    projected, and the teacher's own; the mean of the tokens where not given."""
    row: tuple[str, ...] = ("text",)
    """What each of the sequences of a row is, in order, see `RowForm.sequences`: a batch has so
    many for each of its rows."""
    ensemble: Ensemble | None = None
    """What the embeddings and scores of several teachers come to."""
    last_is_output: bool = False
    """Whether both models hand on the state of their last block as it is, without a norm."""


@dataclass(frozen=True)
class Shared:
    """What all losses of an objective have in common."""

    pair: ModelPair
    reduction: Reduction = "valid"
    projection: Projection = "auto"
    projection_bias: bool = True
    projection_learning_rate: float | None = None
    """Peak learning rate of projections that have none of their own; `None` is the run's."""


@dataclass(frozen=True)
class Setting:
    """What of the rest of a recipe decides whether a loss fits."""

    head: Head
    """Head of the student and the teacher."""
    labelled: bool
    """Whether examples with labels are read, not text."""
    losses: frozenset[str]
    """Registered names of all losses that are on."""
    field: str = "student.head"
    """What says which head it is."""
    rows: RowForm | None = None
    """What a row of texts is; `None` where blocks of text, or a task, are read."""


@dataclass(frozen=True)
class Batch:
    """What the data says of one micro-batch."""

    mask: Tensor | None = None
    """Bool [batch, tokens], `None` where nothing is padded."""
    labels: Tensor | None = None
    """From `target_labels`."""
    row: PackedRow | None = None
    """Where the sequences stand that were read packed, for a term that `reads_packed`."""
    gather: Gather = alone
    """Makes of this micro-batch's [n, ...] the [N, ...] of the whole optimiser step: all ranks in
    turn, of each all micro-batches, in the same order whatever is gathered. Its own n alone carry
    gradient, so return `gathered_value`. In an evaluation as many held-out rows are the whole, in a
    loop of one's own the batch at hand. It is for losses with `least_rows`, and takes what no
    gathered rows went into; above it there are no parameters, whose gradient each micro-batch would
    count."""
    teacher_mask: Tensor | None = None
    """As `mask`, of what the teacher reads."""
    scores: Tensor | None = None
    """A teacher's scores from the data, fp32 [rows, candidates], where it has some; for losses that
    say so in `reads_scores`."""
    label_weights: Tensor | None = None
    """What each label counts in a mean over labels, fp64 and of their shape; `None`: all alike."""
    ids: Tensor | None = None
    """What the student reads, [batch, tokens]."""
    told: bool = False
    """From `tells_predictions`: tokens of a language model without a label are not compared."""

    @property
    def predicted(self) -> Tensor | None:
        """Where what a language model's head gives counts: bool [batch, tokens], `None`: all."""
        if not self.told:
            return self.mask
        assert self.labels is not None, "they tell it"
        return self.labels != IGNORE_INDEX

    @property
    def texts(self) -> Tensor:
        """A number for each sequence, int64 [batch]: that of another one is the same where it holds
        the same tokens and, but for a chance of 2^-64, nowhere else."""
        assert self.ids is not None and self.row is None, "it is asked of padded batches"
        mask = self.ids.new_ones(self.ids.shape) if self.mask is None else self.mask.to(self.ids)
        # padding on the left moves no token
        return (_mixed(self.ids + _mixed(mask.cumsum(dim=1))) * mask).sum(dim=1)


def _mixed(numbers: Tensor) -> Tensor:
    """Numbers scattered over all of int64 (splitmix64, Steele et al., OOPSLA 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers


@dataclass(frozen=True)
class Captures:
    """What a loss reads of both models' passes."""

    attention: bool = False
    """Queries, keys and values of the layers that its layer map links."""
    values: bool = True
    """Whether of these it reads the values; where nobody does, a cached teacher has none."""
    hidden: bool = False
    """States of those layers; without a layer map the embeddings."""
    logits: bool = False
    """What the head gives or, of a language model, multiplies."""
    outputs: bool = False
    """What the model hands on after its final norm."""
    modules: tuple[str, str] | None = None
    """What a submodule of the student gives and one of the teacher, by their paths, such as
    `encoder.layer.1.output`."""


@dataclass(frozen=True)
class LossInfo:
    """One value that a loss gives: whose it is, its name, and what it is a mean over.

    `group` is the part of a loss that maps its own layers: the loss itself, or one relation.
    """

    term: str
    """Key of the loss in the recipe."""
    group: str
    layers: str
    divisor: Divisor
    mapped: bool = False
    """Whether a layer map says what it compares."""

    @property
    def label(self) -> str:
        """Name in metrics and tables."""
        return f"{self.group}/{self.layers}" if self.layers else self.group


class Term(nn.Module):
    """A module of the objective: a loss, or several that share one call or one projection.

    `forward` takes what was captured of student and teacher and a `Batch`, and gives fp32 losses
    [matches], each a mean over its divisor within this micro-batch. Parameters belong to the term
    itself: ZeRO-3 gathers them for its `forward`.
    """

    reads_packed: ClassVar[bool] = False
    """Whether `forward` takes states of packed sequences as they were captured, [1, total, ...];
    others get padded views of them."""

    @property
    @abstractmethod
    def matches(self) -> tuple[LossInfo, ...]:
        """The values that `forward` gives, in order."""

    @abstractmethod
    def at(self, moment: Progress, done: float = 0.0) -> None:
        """Move to a moment of the run, of which a share in [0, 1] is done; what does not change
        over time stays as it is."""

    @abstractmethod
    def layers(self, side: Side, moment: Progress | None = None) -> dict[str, Any]:
        """What `capture` must record of one model now, as some of its keyword arguments; or at a
        moment, whatever the one that the term stands at: a thread that works ahead asks that."""

    def parameter_rates(self) -> dict[str, float]:
        """Peak learning rates of those of its parameters that have another than the run's."""
        return {}

    embeds: ClassVar[bool] = False
    """Whether its losses compare embeddings, so that no other term says what those are."""

    def teacher_embedding(self, teacher: Capture, mask: Tensor | None) -> Tensor | None:
        """What the term reads of the teacher's outputs, [batch, dim], where that is one vector a
        sequence.

        Args:
            teacher: what was captured of it.
            mask: bool [batch, tokens] of what it read, `None` where nothing is padded.
        """
        return None

    def student_modules(self) -> EmbeddingModules | None:
        """What makes the student's embedding, where the term says that; its parameters must be
        whole, and what is returned holds copies of them."""
        return None

    def begin_from(self, start: EmbeddingModules) -> bool:
        """Let the projection of the embedding begin as that of the model that the student starts
        from, if it is one of the same vectors, so that a run goes on where another ended; a bias
        that the term doesn't have is left out. Whether it does."""
        return False


class Loss(Term):
    """A loss of a recipe.

    Subclasses say in class attributes what they are; one that is mapped has a field `layer_map` in
    its `Config`, and then `links`, of which each gives a value.
    """

    Config: ClassVar[type[LossConfig]] = LossConfig
    """Its section in a recipe."""
    captures: Captures = Captures()
    """What it reads; an instance may have one of its own, which reads no more layers."""
    mean_over: Divisor = "examples"
    """What its values are means over within a micro-batch; a property where that depends."""
    group: type[LossGroup] | None = None
    """What computes it together with others; `None` is its own `forward`."""
    heads: ClassVar[tuple[Head, ...]] = tuple(HEADS)
    """Heads of the models that it can be computed for."""
    least_rows: int = 1
    """Rows that a batch must have to be compared; more than one say that the loss compares rows
    with each other, and may call `batch.gather`."""
    official_kind: ClassVar[str | None] = None
    """The only `kind` that `reduction: tinybert` is defined for; `None` where all are."""
    once: ClassVar[bool] = False
    """Whether a recipe can have it only once."""

    config: LossConfig

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        """Take down what the loss is of.

        Args:
            name: its key in the recipe.
            config: its section.
            layer_map: in force for it; `None` where it is not mapped.
            shared: what all losses have in common.

        Raises:
            UserError: a layer map, or models, that the loss can't use.
        """
        super().__init__()
        self.name = name
        self.config = config
        self.layer_map = layer_map
        self.shared = shared
        self.at(Progress())

    @classmethod
    def reads_scores(cls, config: LossConfig) -> bool:
        """Whether it reads scores of the data, `Batch.scores`."""
        return False

    @classmethod
    def is_mapped(cls) -> bool:
        """Whether a layer map says what it compares."""
        return "layer_map" in cls.Config.model_fields

    @classmethod
    def check_setting(cls, name: str, config: LossConfig, setting: Setting) -> None:
        """See that the rest of a recipe fits.

        Raises:
            ValueError: what doesn't, and what to do.
        """
        if setting.head not in cls.heads:
            raise ValueError(
                f"losses.{name} is on, but {setting.field} is {setting.head}; expected "
                f"{' or '.join(cls.heads)}"
            )

    @classmethod
    def check_models(
        cls,
        name: str,
        config: LossConfig,
        heads: tuple[int, int],
        traits: tuple[AttentionTraits, AttentionTraits],
    ) -> None:
        """See that two models can be compared.

        Args:
            name: key in the recipe.
            config: section.
            heads: attention heads of student and teacher.
            traits: what trying the two showed.

        Raises:
            UserError: they can't.
        """

    @classmethod
    def compares_tokens(cls, head: Head) -> bool:
        """Whether the models must read the same tokens, because what it compares of them is of
        tokens, or may be.

        Args:
            head: of the models.
        """
        seen = cls.captures
        of_tokens = seen.logits and HEADS[head].labels != "example"
        states = seen.attention or seen.hidden or seen.outputs or seen.modules is not None
        return of_tokens or states

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for every link; one empty name where the loss is not mapped."""
        return ("",) if self.layer_map is None else self.layer_map.labels()

    @property
    def matches(self) -> tuple[LossInfo, ...]:
        mapped = self.layer_map is not None
        return tuple(
            LossInfo(self.name, self.name, label, self.mean_over, mapped) for label in self.labels
        )

    def at(self, moment: Progress, done: float = 0.0) -> None:
        self.done = done
        self.links = self.links_at(moment)

    def links_at(self, moment: Progress) -> tuple[Link, ...]:
        """What is compared at a moment."""
        return () if self.layer_map is None else checked_links(self.layer_map, moment)

    def layers(self, side: Side, moment: Progress | None = None) -> dict[str, Any]:
        links = self.links if moment is None else self.links_at(moment)
        if side == "student":
            linked = {link.student for link in links}
        else:
            linked = {t for link in links for t in link.teachers}
        wanted: dict[str, Any] = {}
        if self.captures.attention:
            wanted["attention"] = linked
        if self.captures.hidden:
            wanted["hidden"] = linked
        if self.captures.logits:
            wanted["logits"] = True
        if self.captures.outputs:
            wanted["outputs"] = True
        if self.captures.modules is not None:
            wanted["modules"] = {self.captures.modules[side == "teacher"]}
        return wanted

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """A scalar, or [links] of a mapped loss."""
        raise NotImplementedError


class LossGroup(Term):
    """Losses that are computed together; the parameters that they share are the group's own."""

    def __init__(self, members: Sequence[Loss], shared: Shared) -> None:
        super().__init__()
        # in a tuple they are no submodules: names in checkpoints stay those of the group
        self.members = tuple(members)
        self.shared = shared

    @property
    def matches(self) -> tuple[LossInfo, ...]:
        return tuple(match for loss in self.members for match in loss.matches)

    def at(self, moment: Progress, done: float = 0.0) -> None:
        for loss in self.members:
            loss.at(moment, done)

    def layers(self, side: Side, moment: Progress | None = None) -> dict[str, Any]:
        return merged_layers(loss.layers(side, moment) for loss in self.members)

    @abstractmethod
    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """Losses [matches], fp32."""


def merged_layers(wanted: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What several terms want to have recorded, together."""
    found: dict[str, Any] = {}
    for one in wanted:
        for kind, asked in one.items():
            found[kind] = found[kind] | asked if kind in found else asked
    return found
