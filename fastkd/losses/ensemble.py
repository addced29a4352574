"""Several teachers as one: what their embeddings come to, and their scores.

Embeddings are scaled to length one first, so that no teacher counts for the lengths of its vectors.
Concatenated, the cosine of two texts is the mean of the teachers' cosines; the mean lies in a space
as wide as each of them, in which only teachers agree that were trained towards each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastkd.errors import UserError
from fastkd.types import Combine

if TYPE_CHECKING:
    from fastkd.capture import Capture


@dataclass(frozen=True)
class Ensemble:
    """Two teachers or more."""

    dims: tuple[int, ...]
    """Numbers of each one's embedding, the first teacher's first; empty where scores are read."""
    combine: Combine

    def __post_init__(self) -> None:
        """See that a mean can be taken.

        Raises:
            UserError: it can't.
        """
        if self.combine == "mean" and len(set(self.dims)) > 1:
            raise UserError(
                f"teacher.combine is mean, but the teachers' embeddings have "
                f"{', '.join(map(str, self.dims))} numbers; set it to concatenate"
            )

    def __str__(self) -> str:
        if not self.dims:
            return "of which the student learns the mean of the scores"
        how = "the mean of the" if self.combine == "mean" else "all"
        return f"of which the student learns {how} embeddings, {self.dim} numbers"

    @property
    def dim(self) -> int:
        """Numbers of what they come to."""
        return self.dims[0] if self.combine == "mean" else sum(self.dims)

    def __call__(self, first: Capture, others: Sequence[Capture]) -> Capture:
        """What was captured of the first teacher, with the embedding and the scores of all.

        Args:
            first: of its pass.
            others: of the other teachers', with an embedding or scores where the first has them.
        """
        all_of = (first, *others)
        embeddings = [one.embedding for one in all_of if one.embedding is not None]
        scores = [one.logits for one in all_of if isinstance(one.logits, Tensor)]
        return replace(
            first,
            embedding=self.joined(embeddings) if embeddings else None,
            logits=torch.stack(scores).mean(dim=0) if scores else first.logits,
        )

    def joined(self, embeddings: Sequence[Tensor]) -> Tensor:
        """One embedding [n, dim] of several [n, dims]."""
        each = [normalize(vectors, dim=-1) for vectors in embeddings]
        if self.combine == "mean":
            return torch.stack(each).mean(dim=0)
        return torch.cat(each, dim=-1)
