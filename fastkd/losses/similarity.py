"""`losses.similarity`: how the sequences of a step lie to each other."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from fastkd.layer_map.sections import Temperature, check_temperature_read
from fastkd.losses.base import Batch, LossConfig, LossGroup, Setting
from fastkd.losses.gathering import gathered_value
from fastkd.losses.pairs import check_pairs, divergence, queries_and_documents
from fastkd.losses.registry import register_loss
from fastkd.losses.sequence_embeddings import (
    SequenceEmbeddingConfig,
    SequenceEmbeddingGroup,
    SequenceEmbeddingLoss,
)


@register_loss("similarity")
class SimilarityLoss(SequenceEmbeddingLoss):
    """Cosines of the embeddings of a step, the student's against the teacher's (Tung and Mori,
    arXiv 1907.09682; as distributions over the others: Fang et al., arXiv 2101.04731, eq. 3).

    S holds the cosines of each sequence with the others:

        mse  mean over pairs of (S_student - S_teacher)^2
        kl   mean over sequences of KL(softmax(S_teacher / temperature), softmax(S_student / ...))

    Each model is compared with itself, so that dims may differ. All sequences of an optimiser step
    meet, see `Batch.gather`; in an evaluation as many. One sequence has no others
    and gives zero.
    """

    class Config(SequenceEmbeddingConfig):
        """Cosines of the sequences of a step with each other."""

        kind: Literal["mse", "kl"] = "mse"
        """Squared differences of cosines, mean over pairs of sequences; or KL(teacher | student) of
        their softmax over the others, mean over sequences."""
        temperature: Temperature = 0.05
        """What cosines are divided by before the softmax of `kl`."""
        between: Literal["all", "query_document"] = "all"
        """Every sequence with every other; or each query with the documents of all rows, where a
        row has several texts."""

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            check_temperature_read(self, "kl", "kind")
            return self

    config: Config
    group: type[LossGroup] | None = SequenceEmbeddingGroup
    least_rows = 2

    @classmethod
    def check_setting(cls, name: str, config: LossConfig, setting: Setting) -> None:
        super().check_setting(name, config, setting)
        assert isinstance(config, cls.Config)
        if config.between == "query_document":
            check_pairs(f"losses.{name}.between is query_document", setting)

    def compare(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        points, targets = (batch.gather(normalize(one, dim=-1)) for one in (student, teacher))
        found, expected = self._cosines(points), self._cosines(targets)
        if found.numel() == 0:
            return found.sum()
        if self.config.kind == "mse":
            value = mse_loss(found, expected)
        else:
            temperature = self.config.temperature
            value = divergence(found / temperature, expected / temperature)
        return gathered_value(value, len(student), len(points))

    def _cosines(self, points: Tensor) -> Tensor:
        """Cosines of each sequence [n, dim], which has length one, with those it is compared
        with."""
        if self.config.between == "all":
            return without_diagonal(points @ points.mT)
        queries, documents = queries_and_documents(points, len(self.shared.pair.row))
        return queries @ documents.flatten(0, 1).mT


def without_diagonal(matrix: Tensor) -> Tensor:
    """The other entries of each row: [n, n] to [n, n - 1]."""
    size = len(matrix)
    # in one row after another, the diagonal is every entry after n others
    return matrix.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)
