"""What losses of whole embeddings share: both embeddings, the student's projection, prefixes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastkd.errors import UserError
from fastkd.losses.base import Batch, Captures, Loss, LossConfig, LossGroup, ModelPair, Shared
from fastkd.losses.pooling import BEGUN, Dense, EmbeddingModules, Normalize, Pooling
from fastkd.types import Head

if TYPE_CHECKING:
    from fastkd.capture import Capture

ToTeacher = Literal["auto", "none", "own"]


class SequenceEmbeddingConfig(LossConfig):
    """Embeddings of whole sequences."""

    pooling: Pooling | None = None
    """The mean of the tokens that are no padding, the first of them, or the last, in place of both
    models' own pooling; their own where not given. All losses of embeddings share it."""
    dimensions: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Further lengths that embeddings are cut to (Matryoshka, arXiv 2205.13147): the loss is the
    mean over these prefixes, each scaled to length one, and the whole embedding. Where a loss
    compares each model with itself, prefixes of the student learn from the whole teacher."""

    @property
    def reads_lengths(self) -> bool:
        """Whether the lengths of embeddings count, and not their directions alone."""
        return False


class SequenceEmbeddingLoss(Loss):
    """A member of an `SequenceEmbeddingGroup`: it compares embeddings and makes none."""

    config: SequenceEmbeddingConfig
    captures = Captures(outputs=True)
    wants_projection: ClassVar[bool] = False
    """Whether it reads the student in the teacher's space; others only see what there is."""

    @classmethod
    def compares_tokens(cls, head: Head) -> bool:
        """No: an embedding is of a whole sequence."""
        return False

    @classmethod
    def reads_embeddings(cls, head: Head) -> bool:
        """Whether it compares embeddings of models with a head, and not what the head gives."""
        return True

    @property
    def projects(self) -> ToTeacher:
        """From the student's pooled vectors to the teacher's: no layer, one, or one where their
        widths differ."""
        return "auto" if self.wants_projection else "none"

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """The loss of embeddings, or of prefixes of them.

        Args:
            student: [n, dim], fp32 or better.
            teacher: [n, dim], without gradient; of another dim where nothing is projected.
            batch: what the data says of them.

        Returns:
            A scalar.
        """

    def value(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """The mean of `compare` over the whole embeddings and their prefixes."""
        pairs = [(student, teacher)]
        for size in self.config.dimensions:
            if size < student.shape[-1]:
                target = prefix(teacher, size) if self.wants_projection else teacher
                pairs.append((prefix(student, size), target))
        return torch.stack([self.compare(*pair, batch) for pair in pairs]).mean()

    def check_dims(self, student: int, teacher: int) -> None:
        """See that embeddings of these dims can be compared.

        Raises:
            UserError: a prefix that is longer than one of them.
        """
        longest = max(self.config.dimensions, default=0)
        if longest > (min(student, teacher) if self.wants_projection else student):
            raise UserError(
                f"losses.{self.name}.dimensions has {longest}, but the student's embedding has "
                f"{student} numbers and the teacher's {teacher}; give no more than those"
            )


def prefix(embeddings: Tensor, size: int) -> Tensor:
    """The first numbers of embeddings [n, dim], scaled to length one: [n, size]."""
    return normalize(embeddings[:, :size], dim=-1)


class SequenceEmbeddingGroup(LossGroup):
    """Both models' embeddings, made once, and what its members say of them.

    The student's are those that its exported folder gives: its own pooling, the projection to the
    teacher's pooled vectors where a member wants one, and all that stands behind the teacher's
    pooling.
    """

    embeds: ClassVar[bool] = True

    def __init__(self, members: Sequence[Loss], shared: Shared) -> None:
        """Choose the modules and make the projection.

        Raises:
            UserError: members that want different embeddings, or no projection where the widths
                differ.
        """
        super().__init__(members, shared)
        self.losses: list[SequenceEmbeddingLoss] = [
            one for one in members if isinstance(one, SequenceEmbeddingLoss)
        ]
        teacher = _pooled(shared.pair, self.losses)
        self._pooling = teacher.pooling
        if shared.pair.embeddings is not None and self.losses[0].config.pooling is None:
            self._pooling = shared.pair.embeddings[0].pooling
        # what stands in for a teacher where there are several, whose spaces no module joins
        several, dims = shared.pair.ensemble, (teacher.pooled_dim, teacher.dim)
        whole = teacher
        if several is not None:
            dims = several.dim, several.dim
            whole = EmbeddingModules(teacher.width, teacher.pooling, [Normalize()], alone=True)
        sizes = shared.pair.widths[0] * len(self._pooling), dims[0]
        self.projection: nn.Linear | None = None
        self._begun = ""
        if _projects(self.losses, *sizes):
            self.projection = nn.Linear(*sizes, bias=False)
        # in a tuple they are no submodules: nothing of them trains, or is saved
        self._modules_of = (self._student_modules(whole), teacher, whole)
        for loss in self.losses:
            loss.check_dims(self._modules_of[0].dim, dims[1])

    def _student_modules(self, teacher: EmbeddingModules) -> EmbeddingModules:
        width = self.shared.pair.widths[0]
        if self.projection is None:
            return teacher.of_student(width, pooling=self._pooling)
        weight = self.projection.weight.detach().clone()
        name = next(loss.name for loss in self.losses if loss.wants_projection)
        dense = Dense(weight, learned_by=name + self._begun)
        return teacher.of_student(width, dense, self._pooling)

    def begin_from(self, start: EmbeddingModules) -> bool:
        first = start.linear_map
        if self.projection is None or first is None or start.pooling != self._pooling:
            return False
        if first.weight.shape != self.projection.weight.shape:
            return False
        with torch.no_grad():
            self.projection.weight.copy_(first.weight)
        self._begun = BEGUN
        return True

    def parameter_rates(self) -> dict[str, float]:
        rate = self.shared.projection_learning_rate
        return {} if rate is None else {name: rate for name, _ in self.named_parameters()}

    def student_modules(self) -> EmbeddingModules:
        """What makes the student's embedding, with a copy of the projection as it is now, which
        must be whole."""
        return self._student_modules(self._modules_of[2])

    def teacher_embedding(self, teacher: Capture, mask: Tensor | None) -> Tensor:
        assert teacher.outputs is not None, "they were captured"
        with torch.no_grad():
            made: Tensor = self._modules_of[1](teacher.outputs, mask)
        return made

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """Losses [matches], fp32."""
        assert student.outputs is not None, "they were captured"
        own, target = self._modules_of[0], teacher.embedding
        if target is None:
            target = self.teacher_embedding(teacher, batch.teacher_mask)
        vectors = own.pool(student.outputs, batch.mask)
        if self.projection is not None:
            # as wide as the weight, which an engine may have cast; its own forward gathers it
            projected = self.projection(vectors.to(self.projection.weight.dtype))
            vectors = projected.to(vectors.dtype)
        embedding = own.finish(vectors)
        return torch.stack([loss.value(embedding, target, batch) for loss in self.losses])


def _pooled(pair: ModelPair, losses: Sequence[SequenceEmbeddingLoss]) -> EmbeddingModules:
    """The teacher's modules, with the pooling that the losses name.

    Raises:
        UserError: they name different ones, or one that the teacher's other modules don't fit.
    """
    teacher = EmbeddingModules(pair.widths[1]) if pair.embeddings is None else pair.embeddings[1]
    asked = {loss.name: loss.config.pooling for loss in losses}
    if len(set(asked.values())) > 1:
        given = ", ".join(f"losses.{name}: {one or 'their own'}" for name, one in asked.items())
        raise UserError(
            f"pooling of losses of embeddings differs ({given}), but a model has one embedding; "
            "give all of them the same"
        )
    name, pooling = next(iter(asked.items()))
    if pooling is None:
        return teacher
    try:
        return teacher.pooled_by((pooling,))
    except ValueError as error:
        raise UserError(f"losses.{name}.pooling is {pooling}: {error}; leave it out") from error


def _projects(losses: Iterable[SequenceEmbeddingLoss], student: int, teacher: int) -> bool:
    """Whether the student's pooled vectors are projected.

    Raises:
        UserError: a loss wants them as they are, and they can't be.
    """
    modes = {loss.name: loss.projects for loss in losses if loss.wants_projection}
    own = next((name for name, mode in modes.items() if mode == "own"), None)
    bare = next((name for name, mode in modes.items() if mode == "none"), None)
    if bare is not None and student != teacher:
        raise UserError(
            f"losses.{bare}.projection is none, but the student's pooled states have {student} "
            f"numbers and the teacher's {teacher}; set it to own"
        )
    if bare is not None and own is not None:
        raise UserError(
            f"losses.{bare}.projection is none and losses.{own}.projection is own, but a student "
            "has one embedding; give both the same"
        )
    return own is not None or (bool(modes) and student != teacher)
