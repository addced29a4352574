"""Muon for the matrices of the blocks, AdamW for the rest, as one optimiser.

    B = m B + (1 - m) G         momentum
    U = m B + (1 - m) G         Nesterov's look ahead
    W = (1 - lr * decay) W - 0.2 sqrt(max(rows, columns)) lr orthogonal(U)

(Jordan et al. 2024; the factor is that of arXiv 2502.16982, equation 4, which makes an update as
large as one of AdamW: one learning rate serves both.) `orthogonal` is five Newton-Schulz steps, in
fp32: in bf16 the rounding of a gradient, which differs from layout to layout, would be as large as
the result. Products read TF32 where the run lets them.

A matrix must be whole for that. ZeRO 1 and 2 lay the matrices of a group one after the other and
give each rank an equal piece, so all but those at the edges of a piece are whole on one rank; these
are added up from their pieces. The road not taken is DeepSpeed's own Muon, which clips and reports
the norm of the update in the place of the gradient's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM = 0.95
_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPSILON = 1e-7
# the usual size of an update of AdamW
_SIZE = 0.2


@dataclass(frozen=True)
class Piece:
    """This rank's elements of a matrix that lies in a flat tensor with others."""

    shape: torch.Size
    start: int
    """The first of them, in the matrix."""
    length: int
    offset: int
    """Of the first of them, in the flat tensor."""
    shared: bool
    """Whether other ranks have elements of it too."""

    def cut(self, flat: Tensor) -> Tensor:
        """These elements of a tensor that is laid out so."""
        return flat[self.offset : self.offset + self.length]


class Muon(torch.optim.AdamW):
    """Fused AdamW, but for groups with `muon` set, which hold matrices.

    It heeds what torch's GradScaler sets of an optimiser, as fused AdamW does: gradients are
    divided by `grad_scale`, and nothing changes where `found_inf` is 1, without a word of the host.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self._pieces: dict[Tensor, list[Piece]] = {}

    def lie_flat(self, pieces: Mapping[Tensor, Sequence[Piece]]) -> None:
        """Tell where matrices lie in the flat tensors that took their place in the groups."""
        self._pieces = {flat: list(each) for flat, each in pieces.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all groups."""
        assert closure is None, "gradients are there"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                for weight in group["params"]:
                    self._update(weight, group["lr"], group["weight_decay"])

    def _update(self, weight: Tensor, rate: float, decay: float) -> None:
        """Change a matrix, or this rank's pieces of many; collective where matrices are shared."""
        if weight.grad is None:
            return
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        there = weight.grad, state["momentum"]
        if weight not in self._pieces:
            self._change(weight, orthogonal(self._look_ahead(*there)), rate, decay)
            return
        pieces = [piece for piece in self._pieces[weight] if piece.shared or piece.length]
        ahead = [self._look_ahead(*(piece.cut(tensor) for tensor in there)) for piece in pieces]
        matrices = _whole(pieces, ahead)
        for piece, matrix in zip(pieces, matrices, strict=True):
            if piece.length:
                made = orthogonal(matrix.view(piece.shape)).reshape(-1)
                made = made[piece.start : piece.start + piece.length]
                self._change(piece.cut(weight), made, rate, decay)

    def _look_ahead(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Move the momentum, and give what is made orthogonal."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None:
            gradient = gradient / scale
        self._set(momentum, momentum.lerp(gradient, 1 - MOMENTUM))
        return gradient.lerp(momentum, MOMENTUM)

    def _change(self, weight: Tensor, update: Tensor, rate: float, decay: float) -> None:
        self._set(weight, weight * (1 - rate * decay) - rate * update)

    def _set(self, tensor: Tensor, value: Tensor) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            value = torch.where(found_inf.bool(), tensor, value)
        tensor.copy_(value)


def _whole(pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of pieces of matrices the matrices, flat; those that ranks share are added up."""
    shared = [number for number, piece in enumerate(pieces) if piece.shared]
    found = list(tensors)
    if not shared:
        return found
    sizes = [pieces[number].shape.numel() for number in shared]
    flat = tensors[0].new_zeros(sum(sizes))
    for number, matrix in zip(shared, torch.split(flat, sizes), strict=True):
        piece = pieces[number]
        matrix[piece.start : piece.start + piece.length] = tensors[number]
        found[number] = matrix
    dist.all_reduce(flat)
    return found


def orthogonal(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, about, times the factor that makes it as large as an
    update of AdamW: singular values between 0.7 and 1.2 of one.

    Args:
        update: [rows, columns].
    """
    rows, columns = update.shape
    made: Tensor = update / (update.norm() + _EPSILON)
    if rows > columns:
        made = made.mT
    for _ in range(_STEPS):
        gram = made @ made.mT
        made = _A * made + (_B * gram + _C * gram @ gram) @ made
    made = _SIZE * math.sqrt(max(rows, columns)) * made
    return made.mT if rows > columns else made


def block_matrices(blocks: nn.Module) -> set[nn.Parameter]:
    """The matrices of blocks that multiply states: neither biases nor norms, nor rows that are
    looked up, nor stacked experts."""
    looked_up = {
        parameter
        for module in blocks.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    return {p for p in blocks.parameters() if p.ndim == 2 and p not in looked_up}
