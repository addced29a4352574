"""`losses.score`: how relevant the candidates of a row are to its query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.layer_map import LayerMap
from fastkd.layer_map.sections import Temperature, check_temperature_read
from fastkd.losses.base import Batch, Captures, LossConfig, LossGroup, Setting, Shared
from fastkd.losses.pairs import divergence, queries_and_documents
from fastkd.losses.registry import register_loss
from fastkd.losses.sequence_embeddings import (
    SequenceEmbeddingConfig,
    SequenceEmbeddingGroup,
    SequenceEmbeddingLoss,
)
from fastkd.types import Head

if TYPE_CHECKING:
    from fastkd.capture import Capture

_OF_EMBEDDINGS = ("similarity", "scale", "pooling", "dimensions")


@register_loss("score")
class ScoreLoss(SequenceEmbeddingLoss):
    """Scores of a row's candidates, the student's against a teacher's; mean over rows.

    A reranker's score is the one output of its head, read of query and candidate together. A
    bi-encoder's is the similarity of the query's embedding and the candidate's. Margins are
    compared as in MarginMSE (Hofstätter et al., arXiv 2010.02666, eq. 7), whose first candidate is
    the relevant one; here all others are set against it. Lists are compared by their softmax
    (ListNet, Cao et al., ICML 2007; RocketQAv2, arXiv 2110.07367, eq. 5).
    """

    class Config(SequenceEmbeddingConfig):
        """Scores of candidates."""

        kind: Literal["mse", "margin_mse", "listwise_kl"] = "mse"
        """Squared differences of scores; of the margins of the first candidate over each other
        one; or KL(teacher | student) of the softmax over a row's candidates."""
        target: Literal["teacher", "file"] = "teacher"
        """The teacher's scores, or those in `data.scores`."""
        temperature: Temperature = 1.0
        """What the scores of both are divided by before the softmax of `listwise_kl`."""
        similarity: Literal["cosine", "dot"] = "cosine"
        """Score of two embeddings, of models without a head."""
        scale: Temperature = 1.0
        """What similarities of embeddings are multiplied by, of student and teacher alike."""

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            check_temperature_read(self, "listwise_kl", "kind")
            if self.similarity == "dot" and self.dimensions:
                raise ValueError(
                    "similarity is dot, but dimensions names prefixes, which are scaled to length "
                    "one; take cosine, or leave dimensions out"
                )
            return self

        @property
        def reads_lengths(self) -> bool:
            return self.similarity == "dot"

    config: Config
    group: type[LossGroup] | None = SequenceEmbeddingGroup

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        super().__init__(name, config, layer_map, shared)
        pair = shared.pair
        if self.reads_embeddings(pair.head):
            return
        if pair.outputs != 1:
            raise UserError(
                f"losses.{name} compares scores, but the models' heads give {pair.outputs} "
                "numbers; give a teacher whose head gives one (num_labels 1), or take losses.logits"
            )
        # no embeddings are made
        self.captures, self.group = Captures(logits=True), None

    @classmethod
    def check_setting(cls, name: str, config: LossConfig, setting: Setting) -> None:
        super().check_setting(name, config, setting)
        assert isinstance(config, cls.Config)
        rows = setting.rows
        candidates = 0 if rows is None else len(rows.texts) - 1
        if rows is None or not candidates:
            raise ValueError(
                f"losses.{name} compares the candidates of a row, but a row of the data is one "
                "text; set data.documents to row and name the columns of query and candidates in "
                "data.columns"
            )
        if config.kind != "mse" and candidates < 2:
            raise ValueError(
                f"losses.{name}.kind is {config.kind}, which compares a row's candidates with each "
                "other, but a row has one; name several in data.columns or data.candidates, or "
                "take mse"
            )
        if config.target == "file" and not rows.scores:
            raise ValueError(
                f"losses.{name}.target is file, but data.scores names no column; name those with "
                "the scores of the candidates, or set target to teacher"
            )
        if not cls.reads_embeddings(setting.head):
            # a resolved recipe names every field
            fields = cls.Config.model_fields
            unread = [n for n in _OF_EMBEDDINGS if getattr(config, n) != fields[n].default]
            for field in unread:
                raise ValueError(
                    f"losses.{name}.{field} is of embeddings, but {setting.field} is "
                    f"{setting.head}, whose output is the score; leave {field} out"
                )

    @classmethod
    def reads_scores(cls, config: LossConfig) -> bool:
        assert isinstance(config, cls.Config)
        return config.target == "file"

    @classmethod
    def reads_embeddings(cls, head: Head) -> bool:
        # a reranker reads query and candidate together
        return HEADS[head].labels != "example"

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """A scalar, fp32; of rerankers."""
        found, expected = (_scores(one, len(self.shared.pair.row)) for one in (student, teacher))
        return self._value(found, expected, batch)

    def compare(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        found, expected = (self._similarities(one) for one in (student, teacher))
        return self._value(found, expected, batch)

    def _similarities(self, embeddings: Tensor) -> Tensor:
        """Similarities of each query to its candidates, [rows, candidates]."""
        if self.config.similarity == "cosine":
            embeddings = normalize(embeddings, dim=-1)
        queries, candidates = queries_and_documents(embeddings, len(self.shared.pair.row))
        return (candidates @ queries.unsqueeze(-1)).squeeze(-1) * self.config.scale

    def _value(self, found: Tensor, expected: Tensor, batch: Batch) -> Tensor:
        """The loss of scores [rows, candidates]."""
        if self.config.target == "file":
            assert batch.scores is not None, "data.scores are read"
            expected = batch.scores.to(found.dtype)
        if self.config.kind == "listwise_kl":
            temperature = self.config.temperature
            return divergence(found / temperature, expected / temperature)
        if self.config.kind == "margin_mse":
            found, expected = (one[:, :1] - one[:, 1:] for one in (found, expected))
        return mse_loss(found, expected)


def _scores(captured: Capture, candidates: int) -> Tensor:
    """What a head gave of each row, [rows, candidates], in fp32 or better."""
    logits = captured.logits
    assert isinstance(logits, Tensor), "a classifier was captured with its logits"
    found = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return found.reshape(-1, candidates)
