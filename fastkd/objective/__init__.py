"""The objective: which tensors are matched, by which op, and how the terms add up."""

from fastkd.objective.attention import AttentionTerm
from fastkd.objective.divisors import Inputs, count_divisors
from fastkd.objective.module import Match, Objective
from fastkd.objective.states import StateTerm

__all__ = ["AttentionTerm", "Inputs", "Match", "Objective", "StateTerm", "count_divisors"]
