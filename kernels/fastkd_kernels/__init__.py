"""Distillation losses over layer pairs in linear memory: PyTorch on the CPU, Triton on GPUs."""

from .attention_divergence import attention_divergence
from .attention_score_mse import attention_score_mse
from .hidden_cosine import hidden_cosine, hidden_normalized_mse
from .hidden_mse import hidden_mse
from .logits_divergence import logits_divergence
from .relation_divergence import relation_divergence
from .types import AttentionState, LogitsHead

__all__ = [
    "AttentionState",
    "LogitsHead",
    "attention_divergence",
    "attention_score_mse",
    "hidden_cosine",
    "hidden_mse",
    "hidden_normalized_mse",
    "logits_divergence",
    "relation_divergence",
]
