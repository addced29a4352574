"""Distillation losses over layer pairs in linear memory: PyTorch on the CPU, Triton on GPUs."""

from .attention_score_mse import attention_score_mse
from .hidden_mse import hidden_mse
from .types import AttentionState

__all__ = ["AttentionState", "attention_score_mse", "hidden_mse"]
