"""Distillation losses over layer pairs in linear memory: PyTorch on the CPU, Triton on GPUs."""

from .attention_divergence.op import attention_divergence
from .attention_divergence.relation import relation_divergence
from .attention_score_mse.op import attention_score_mse
from .hidden.op import hidden_cosine, hidden_mse, hidden_normalized_mse
from .indexer_divergence.op import indexer_divergence
from .logits_divergence.op import logits_divergence
from .types import (
    AttentionDivergenceKind,
    AttentionReduction,
    AttentionState,
    IndexerState,
    LogitsDivergenceKind,
    LogitsHead,
)

__all__ = [
    "AttentionDivergenceKind",
    "AttentionReduction",
    "AttentionState",
    "IndexerState",
    "LogitsDivergenceKind",
    "LogitsHead",
    "attention_divergence",
    "attention_score_mse",
    "hidden_cosine",
    "hidden_mse",
    "hidden_normalized_mse",
    "indexer_divergence",
    "logits_divergence",
    "relation_divergence",
]
