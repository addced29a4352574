"""Exact transport between student and teacher layers, for `TransportMap`.

A cost matrix has a few hundred entries at most: a linear program on the host is exact and takes
milliseconds. The road not taken: Sinkhorn iterations on the device, whose plan depends on a
regulariser that nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def exact_flow(cost: Matrix, supply: Matrix, demand: Matrix) -> Matrix:
    """The cheapest flow [students, teachers] with the given row and column sums.

    Solves min sum_ij f_ij c_ij under sum_j f_ij = supply_i, sum_i f_ij = demand_j, f >= 0
    (BERT-EMD, arXiv 2010.06133; both margins sum to one, so all of it moves).

    Args:
        cost: fp64 [students, teachers].
        supply: fp64 [students], positive.
        demand: fp64 [teachers], positive, with the sum of `supply`.
    """
    # half a second, which no other layer map needs
    from scipy.optimize import linprog

    students, teachers = cost.shape
    rows = np.kron(np.eye(students), np.ones(teachers))
    columns = np.kron(np.ones(students), np.eye(teachers))
    # one of the constraints follows from the others, and rounding must not make them disagree
    equations = np.concatenate([rows, columns[:-1]])
    solved = linprog(
        cost.ravel(),
        A_eq=equations,
        b_eq=np.concatenate([supply, demand[:-1]]),
        bounds=(0, None),
        method="highs",
    )
    assert solved.success, f"a balanced transport has a solution ({solved.message})"
    flow: Matrix = solved.x.reshape(students, teachers)
    return flow


@dataclass
class Transport:
    """Layer weights of both models, and how the costs of a step move them."""

    student: Matrix
    teacher: Matrix

    @classmethod
    def even(cls, students: int, teachers: int) -> Transport:
        """Every layer of a model weighs the same."""
        return cls(np.full(students, 1 / students), np.full(teachers, 1 / teachers))

    def flow(self, cost: Matrix) -> Matrix:
        """The exact flow between the layers as they weigh now."""
        return exact_flow(cost, self.student, self.teacher)

    def attend(
        self, costs: list[Matrix], flows: list[Matrix], temperature: float | None = None
    ) -> None:
        """Give layers that are cheap to serve more weight (BERT-EMD's cost attention).

        For each matrix a layer's unit cost is what its flow costs over its weight. Its score is the
        mean unit cost over its own, and its new weight its part of all scores, as the official code
        has it, or their softmax. Several matrices (attention, hidden states) are averaged.

        Args:
            costs: [students, teachers], one a term.
            flows: likewise, the flow of each.
            temperature: of the softmax; `None` takes parts.
        """
        spent = [cost * flow for cost, flow in zip(costs, flows, strict=True)]
        pairs = ((1, self.student), (0, self.teacher))
        self.student, self.teacher = (
            np.mean([_attention(s.sum(axis) / weight, temperature) for s in spent], axis=0)
            for axis, weight in pairs
        )


def _attention(unit_cost: Matrix, temperature: float | None) -> Matrix:
    # a layer that costs nothing would have an infinite score: it is served as it is
    mean = unit_cost.mean()
    if not mean:
        return np.full(unit_cost.shape, 1 / unit_cost.size)
    scores = mean / np.maximum(unit_cost, mean * 1e-6)
    if temperature is not None:
        scores = np.exp((scores - scores.max()) / temperature)
    share: Matrix = scores / scores.sum()
    floored: Matrix = np.maximum(share, 1e-6)
    return floored / float(floored.sum())
