"""The objective: which tensors are matched, by which op, and how the terms add up."""

from fastkd.objective.divisors import (
    DIVISORS,
    IGNORED,
    Inputs,
    count_divisors,
    model_inputs,
    target_labels,
)
from fastkd.objective.logits import LogitsTerm
from fastkd.objective.module import Objective
from fastkd.objective.relation_heads import AttentionShape, attention_shape, check_relation_heads
from fastkd.objective.states import StateTerm
from fastkd.objective.term import Match, ModelPair, Term

__all__ = [
    "DIVISORS",
    "IGNORED",
    "AttentionShape",
    "Inputs",
    "LogitsTerm",
    "Match",
    "ModelPair",
    "Objective",
    "StateTerm",
    "Term",
    "attention_shape",
    "check_relation_heads",
    "count_divisors",
    "model_inputs",
    "target_labels",
]
