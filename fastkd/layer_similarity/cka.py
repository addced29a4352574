"""Linear CKA of hidden states from their second moments, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]


class LinearCKA:
    """Linear CKA of every pair of a student's and a teacher's layers, batch by batch.

    With features centred over all tokens, X [tokens, d_s] and Y [tokens, d_t],

        CKA = |Y^T X|^2 / (|X^T X| |Y^T Y|)          Frobenius norms (Kornblith et al., arXiv
                                                     1905.00414, section 3)

    Sums and second moments are kept in fp64: [d_s, d_t] for every pair and [d, d] for every layer,
    independent of the number of tokens.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._student: list[_Moments] = []
        self._teacher: list[_Moments] = []
        self._cross: list[list[Tensor]] = []

    def add(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Add the same tokens' features of every layer: [tokens, width] each, in any dtype."""
        own = [features.double() for features in student]
        target = [features.double() for features in teacher]
        if not self.tokens:
            self._student = [_Moments(x) for x in own]
            self._teacher = [_Moments(y) for y in target]
            self._cross = [[x.new_zeros(x.shape[1], y.shape[1]) for y in target] for x in own]
        own = [moments.add(x) for moments, x in zip(self._student, own, strict=True)]
        target = [moments.add(y) for moments, y in zip(self._teacher, target, strict=True)]
        for row, x in zip(self._cross, own, strict=True):
            for cross, y in zip(row, target, strict=True):
                cross.addmm_(x.T, y)
        self.tokens += len(own[0])

    def result(self) -> Matrix:
        """[student layers, teacher layers]; NaN where a layer gives every token the same."""
        found = np.full((len(self._student), len(self._teacher)), math.nan)
        for i, own in enumerate(self._student):
            for j, target in enumerate(self._teacher):
                cross = self._cross[i][j] - torch.outer(own.sum, target.sum) / self.tokens
                norms = own.norm(self.tokens) * target.norm(self.tokens)
                if norms > 0:
                    found[i, j] = float(cross.square().sum()) / norms
        return found


class _Moments:
    """Sum and second moment of one layer's features, about the mean of its first tokens."""

    def __init__(self, first: Tensor) -> None:
        # features with a mean far from zero would lose their digits otherwise
        self.shift = first.mean(dim=0)
        self.sum = torch.zeros_like(self.shift)
        self.second = first.new_zeros(first.shape[1], first.shape[1])

    def add(self, features: Tensor) -> Tensor:
        """Add [tokens, width] and return them shifted."""
        shifted = features - self.shift
        self.sum += shifted.sum(dim=0)
        self.second.addmm_(shifted.T, shifted)
        return shifted

    def norm(self, tokens: int) -> float:
        """Frobenius norm of the second moment about the mean; 0 if it is only rounding."""
        centred = self.second - torch.outer(self.sum, self.sum) / tokens
        norm = float(centred.norm())
        scale = tokens * float(self.shift.square().sum())
        return norm if norm > 1e-24 * scale else 0.0
