"""`losses.embedding_output`: what embedding models give out."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fastkd.losses.base import Batch, LossGroup
from fastkd.losses.registry import register_loss
from fastkd.losses.sequence_embeddings import (
    SequenceEmbeddingConfig,
    SequenceEmbeddingGroup,
    SequenceEmbeddingLoss,
    ToTeacher,
)


@register_loss("embedding_output")
class EmbeddingOutputLoss(SequenceEmbeddingLoss):
    """The student's embedding against the teacher's, mean over examples.

    Of embeddings u and v of a sequence:

        cosine      1 - cos(u, v)
        mse         mean over numbers of (u / |u| - v / |v|)^2
        vector_mse  mean over numbers of (u - v)^2

    Both are what the users of the models get, by the modules of the teacher's folder. Where the
    widths differ, a linear layer without bias takes the student's pooled states to the teacher's
    and is exported with the student, whose queries then search an index of the teacher's (LEAF,
    arXiv 2509.12539).
    """

    class Config(SequenceEmbeddingConfig):
        """Embeddings as the models give them out."""

        kind: Literal["cosine", "mse", "vector_mse"] = "cosine"
        """One minus the cosine; the mean over numbers of the squared difference of embeddings
        scaled to length one, which is 2 / dim times that; or of the embeddings as they are, whose
        lengths count where they are compared by dot product."""
        projection: ToTeacher = "auto"
        """From the student's pooled states to the teacher's: none, a layer of this loss, or one
        where widths differ."""

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if self.reads_lengths and self.dimensions:
                raise ValueError(
                    "kind is vector_mse, but dimensions names prefixes, which are scaled to length "
                    "one; take cosine or mse, or leave dimensions out"
                )
            return self

        @property
        def reads_lengths(self) -> bool:
            return self.kind == "vector_mse"

    config: Config
    group: type[LossGroup] | None = SequenceEmbeddingGroup
    wants_projection: ClassVar[bool] = True

    @property
    def projects(self) -> ToTeacher:
        return self.config.projection

    def compare(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """A scalar; both [n, dim]."""
        if self.config.kind == "cosine":
            return (1 - cosine_similarity(student, teacher, dim=-1)).mean()
        if self.config.kind == "vector_mse":
            return (student - teacher).square().mean()
        return (normalize(student, dim=-1) - normalize(teacher, dim=-1)).square().mean()
