"""The objective: which tensors are matched, by which op, and how the terms add up."""

from fastkd.losses.base import (
    LossInfo,
    ModelPair,
    Term,
)
from fastkd.losses.counts import (
    DIVISORS,
    count_divisors,
    model_inputs,
    target_labels,
)
from fastkd.losses.hidden import StateTerm
from fastkd.losses.logits import LogitsTerm
from fastkd.losses.objective import DistilledStudent, Objective
from fastkd.losses.relation_heads import check_relation_heads

__all__ = [
    "DIVISORS",
    "DistilledStudent",
    "LogitsTerm",
    "LossInfo",
    "ModelPair",
    "Objective",
    "StateTerm",
    "Term",
    "check_relation_heads",
    "count_divisors",
    "model_inputs",
    "target_labels",
]
