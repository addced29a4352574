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
from fastkd.objective.relation_heads import check_relation_heads
from fastkd.objective.states import StateTerm
from fastkd.objective.term import Match, ModelPair, Term

__all__ = [
    "DIVISORS",
    "IGNORED",
    "Inputs",
    "LogitsTerm",
    "Match",
    "ModelPair",
    "Objective",
    "StateTerm",
    "Term",
    "check_relation_heads",
    "count_divisors",
    "model_inputs",
    "target_labels",
]
