"""`losses.contrastive`: each query finds its document among all of a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastkd.layer_map.sections import Temperature
from fastkd.losses.base import Batch, LossConfig, LossGroup, Setting
from fastkd.losses.gathering import gathered_value
from fastkd.losses.pairs import check_pairs, divergence, queries_and_documents
from fastkd.losses.registry import register_loss
from fastkd.losses.sequence_embeddings import (
    SequenceEmbeddingConfig,
    SequenceEmbeddingGroup,
    SequenceEmbeddingLoss,
)


@register_loss("contrastive")
class ContrastiveLoss(SequenceEmbeddingLoss):
    """InfoNCE with in-batch negatives (van den Oord et al., arXiv 1807.03748, eq. 4).

        - log(exp(cos(q, d) / temperature) / sum over documents d' of exp(cos(q, d') / temperature))

    The first text of a row is its query, the second the document to be found, others are negatives.
    Each query chooses among the documents and negatives of all rows of an optimiser step, see
    `Batch.gather`; in an evaluation of as many. Mean over rows. What is right for a row is
    wrong for none: texts equal to its document, and documents of rows with the same query, are no
    choices of its own.
    """

    class Config(SequenceEmbeddingConfig):
        """Queries against the documents of all rows of a step."""

        temperature: Temperature = 0.05
        """What cosines are divided by before the softmax."""
        symmetric: bool = False
        """Let each document choose among the queries of all rows too, and take the mean of both."""
        distilled: bool = False
        """Learn from the teacher's softmax over the same choices, KL(teacher | student), in place
        of the row's own document."""

    config: Config
    group: type[LossGroup] | None = SequenceEmbeddingGroup
    least_rows = 2

    @classmethod
    def check_setting(cls, name: str, config: LossConfig, setting: Setting) -> None:
        super().check_setting(name, config, setting)
        check_pairs(f"losses.{name} is on", setting)

    def compare(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        points = batch.gather(normalize(student, dim=-1))
        logits = self._logits(points)
        if self.config.distilled:
            expected = self._logits(batch.gather(normalize(teacher, dim=-1)))
            values = [divergence(*both) for both in zip(logits, expected, strict=True)]
        else:
            right = self._also_right(batch.gather(batch.texts))
            values = [
                cross_entropy(found.masked_fill(where, -math.inf), self._own(found))
                for found, where in zip(logits, right, strict=False)
            ]
        return gathered_value(torch.stack(values).mean(), len(student), len(points))

    def _logits(self, points: Tensor) -> list[Tensor]:
        """Logits of queries [rows, documents] and, where symmetric, of documents [rows, rows]."""
        queries, documents = queries_and_documents(points, len(self.shared.pair.row))
        pairs = [(queries, documents.flatten(0, 1))]
        if self.config.symmetric:
            pairs.append((documents[:, 0], queries))
        return [of @ among.mT / self.config.temperature for of, among in pairs]

    def _also_right(self, texts: Tensor) -> list[Tensor]:
        """Which choices are right beside a row's own, bool, in the order of `_logits`."""
        rows = texts.view(-1, len(self.shared.pair.row))
        # each row's document among the documents of all rows and their negatives
        same_text = rows[:, 1, None, None] == rows[None, :, 1:]
        same_query = rows[:, :1] == rows[:, 0]
        right = same_text[..., 0] | same_query
        right &= ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        return [torch.cat([right[..., None], same_text[..., 1:]], dim=-1).flatten(1), right]

    @staticmethod
    def _own(logits: Tensor) -> Tensor:
        """Which of the choices belongs to each row: its first."""
        rows, choices = logits.shape
        return torch.arange(0, choices, choices // rows, device=logits.device)
