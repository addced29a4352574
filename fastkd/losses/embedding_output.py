"""`losses.embedding_output`: what embedding models give out."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fastkd.losses.base import Batch, LossGroup
from fastkd.losses.embeddings import EmbeddingConfig, EmbeddingGroup, EmbeddingLoss, ToTeacher
from fastkd.losses.registry import register_loss


@register_loss("embedding_output")
class EmbeddingOutputLoss(EmbeddingLoss):
    """The student's embedding against the teacher's, mean over examples.

    Of embeddings u and v of a sequence:

        cosine  1 - cos(u, v)
        mse     mean over numbers of (u / |u| - v / |v|)^2

    Both are what the users of the models get, by the modules of the teacher's folder. Where the
    widths differ, a linear layer without bias takes the student's pooled states to the teacher's
    and is exported with the student, whose queries then search an index of the teacher's (LEAF,
    arXiv 2509.12539).
    """

    class Config(EmbeddingConfig):
        """Embeddings as the models give them out."""

        kind: Literal["cosine", "mse"] = "cosine"
        """One minus the cosine, or the mean over numbers of the squared difference of embeddings
        scaled to length one, which is 2 / dim times that."""
        projection: ToTeacher = "auto"
        """From the student's pooled states to the teacher's: none, a layer of this loss, or one
        where widths differ."""

    config: Config
    group: type[LossGroup] | None = EmbeddingGroup
    wants_projection: ClassVar[bool] = True

    @property
    def projects(self) -> ToTeacher:
        return self.config.projection

    def compare(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """A scalar; both [n, dim]."""
        if self.config.kind == "cosine":
            return (1 - cosine_similarity(student, teacher, dim=-1)).mean()
        return (normalize(student, dim=-1) - normalize(teacher, dim=-1)).square().mean()
