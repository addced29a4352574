"""Inputs and calls that the tests and benchmarks of indexer_divergence share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from conditioning import Change, Define
from fastkd_kernels import AttentionState, IndexerState, indexer_divergence, reference
from kernel_cases import loss_and_gradients
from torch import Tensor


class IndexerCase(NamedTuple):
    """Indexers, which require grad, and the attention of their layers."""

    student: list[IndexerState]
    teacher: list[AttentionState]

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for state in self.student for tensor in state]

    def mapped(self, change: Change) -> IndexerCase:
        """Every tensor changed; those of the indexers are leaves."""
        return IndexerCase(
            [IndexerState(*(change(t.detach()).requires_grad_() for t in s)) for s in self.student],
            [
                s._replace(
                    query=change(s.query),
                    key=change(s.key),
                    sinks=None if s.sinks is None else change(s.sinks),
                )
                for s in self.teacher
            ],
        )

    def cast(self, dtype: torch.dtype) -> IndexerCase:
        return self.mapped(lambda tensor: tensor.to(dtype))

    def run(self, **options: Any) -> list[Tensor]:
        """Losses and gradients of the op."""
        return loss_and_gradients(
            indexer_divergence, self.leaves, self.student, self.teacher, **options
        )

    def defined(self, **options: Any) -> list[Tensor]:
        """Those of the definition, in the precision of the inputs."""
        options.pop("backend", None)
        return loss_and_gradients(
            reference.indexer_divergence, self.leaves, self.student, self.teacher, **options
        )

    def exactly(self, **options: Any) -> Define:
        """The definition on what the tensors become by a change."""
        return lambda change: self.mapped(change).defined(**options)

    def both(self, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The op, and its definition on fp64 copies."""
        return self.run(**options), self.cast(torch.float64).defined(**options)


def indexer_case(
    pairs: int,
    batch: int,
    tokens: int,
    dims: tuple[int, int],
    *,
    index_heads: int = 3,
    heads: tuple[int, int] = (4, 2),
    sinks: bool = False,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: str = "cpu",
) -> IndexerCase:
    """Random states; `dims` are index and teacher head sizes, `heads` the teacher's and its keys'.

    Index scores are of the size of attention scores.
    """
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dim, teacher_dim = dims
    student = [
        IndexerState(
            made(batch, index_heads, tokens, dim),
            made(batch, tokens, dim),
            made(batch, tokens, index_heads) * 2 * (index_heads * dim) ** -0.5,
        )
        for _ in range(pairs)
    ]
    teacher = [
        AttentionState(
            made(batch, heads[0], tokens, teacher_dim),
            made(batch, heads[1], tokens, teacher_dim),
            None,
            teacher_dim**-0.5,
            softcap,
            made(heads[0]) if sinks else None,
        )
        for _ in range(pairs)
    ]
    case = IndexerCase(student, teacher).mapped(lambda tensor: tensor.to(device, dtype))
    return case


def near_case(
    distance: float,
    dtype: torch.dtype,
    *,
    tokens: int,
    heads: int = 3,
    dim: int = 8,
    device: str = "cpu",
) -> IndexerCase:
    """Indexers whose scores are those of every teacher head, but for a relative `distance`.

    Queries, key and weights are positive, so that no product is cut; four pairs, so that the errors
    of the losses are no single draw.
    """
    case = indexer_case(4, 1, tokens, (dim, dim), index_heads=2, heads=(heads, 1))
    case = case.mapped(torch.abs).cast(dtype)
    generator = torch.Generator().manual_seed(1)
    teacher = []
    for indexer, state in zip(case.student, case.teacher, strict=True):
        query, key, weights = (tensor.detach().double() for tensor in indexer)
        # sum of w q is the one query of a linear indexer
        summed = (query * weights.mT[..., None]).sum(1, keepdim=True).expand(-1, heads, -1, -1)
        noise = torch.randn(summed.shape, generator=generator, dtype=torch.float64)
        moved = summed * (1.0 + distance * noise)
        teacher.append(state._replace(query=moved, key=key[:, None], scale=1.0))
    made = IndexerCase(case.student, teacher)
    return made.mapped(lambda tensor: tensor.to(device, dtype))


def padded_with_nan(case: IndexerCase, valid: Tensor) -> IndexerCase:
    """NaN at the tokens that are not valid, `[batch, tokens]`."""

    def filled(tensor: Tensor, mask: Tensor) -> Tensor:
        return tensor.detach().masked_fill(~mask, torch.nan)

    heads, rows = valid[:, None, :, None], valid[..., None]
    student = [
        IndexerState(filled(s.query, heads), filled(s.key, rows), filled(s.weights, rows))
        for s in case.student
    ]
    teacher = [
        s._replace(query=filled(s.query, heads), key=filled(s.key, heads)) for s in case.teacher
    ]
    return IndexerCase(student, teacher).mapped(lambda tensor: tensor)
