"""The definition of every op in plain PyTorch: what the fast paths are tested and timed against.

Nothing here saves memory. Every function works in the precision of its inputs, fp64 included.
"""

from .attention_divergence.reference import attention_divergence, relation_divergence
from .attention_score_mse.reference import attention_score_mse, attention_scores
from .hidden.reference import hidden_cosine, hidden_mse, hidden_normalized_mse
from .indexer_divergence.reference import indexer_divergence
from .logits_divergence.reference import logits_divergence

__all__ = [
    "attention_divergence",
    "attention_score_mse",
    "attention_scores",
    "hidden_cosine",
    "hidden_mse",
    "hidden_normalized_mse",
    "indexer_divergence",
    "logits_divergence",
    "relation_divergence",
]
