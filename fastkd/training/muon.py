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
are added up from their pieces. Matrices of one shape are multiplied at once, which spares a GPU's
host hundreds of launches. The road not taken is DeepSpeed's own Muon, which clips and reports
the norm of the update in the place of the gradient's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """Place of the first of them in the flat tensor."""
    shared: bool
    """Whether other ranks have elements of it too."""

    def cut(self, flat: Tensor) -> Tensor:
        """These elements of a tensor that is laid out so."""
        return flat[self.offset : self.offset + self.length]


class _Matrix(NamedTuple):
    """What an update reads and changes."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor

    def cut(self, piece: Piece) -> _Matrix:
        """A matrix that is whole in a flat tensor."""
        return _Matrix(*(piece.cut(flat).view(piece.shape) for flat in self))


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
                self._update(group["params"], group["lr"], group["weight_decay"])

    def _update(self, weights: Sequence[Tensor], rate: float, decay: float) -> None:
        """Change matrices, or this rank's pieces of many; collective where they are shared."""
        whole: list[_Matrix] = []
        for weight in weights:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            there = _Matrix(weight, weight.grad, state["momentum"])
            if weight not in self._pieces:
                whole.append(there)
                continue
            pieces = self._pieces[weight]
            whole += [there.cut(p) for p in pieces if p.length and not p.shared]
            self._update_shared(there, [p for p in pieces if p.shared], rate, decay)
        for alike in _alike(whole):
            self._update_whole(alike, rate, decay)

    def _update_whole(self, alike: Sequence[_Matrix], rate: float, decay: float) -> None:
        """Change matrices of one shape, all in one product."""
        if len(alike) == 1:
            weight, gradient, momentum = alike[0]
            self._change(weight, orthogonal(self._look_ahead(gradient, momentum)), rate, decay)
            return
        weights, gradients, momenta = (torch.stack(each) for each in zip(*alike, strict=True))
        ahead = self._look_ahead(gradients, momenta)
        self._change(weights, orthogonal(ahead), rate, decay)
        torch._foreach_copy_([matrix.momentum for matrix in alike], list(momenta.unbind()))
        torch._foreach_copy_([matrix.weight for matrix in alike], list(weights.unbind()))

    def _update_shared(
        self, there: _Matrix, pieces: Sequence[Piece], rate: float, decay: float
    ) -> None:
        """Change this rank's pieces of matrices that others have pieces of."""
        if not pieces:
            return
        ahead = [self._look_ahead(p.cut(there.gradient), p.cut(there.momentum)) for p in pieces]
        for piece, matrix in zip(pieces, _summed(pieces, ahead), strict=True):
            if piece.length:
                made = orthogonal(matrix.view(piece.shape)).reshape(-1)
                made = made[piece.start : piece.start + piece.length]
                self._change(piece.cut(there.weight), made, rate, decay)

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


def _alike(matrices: Sequence[_Matrix]) -> Iterator[list[_Matrix]]:
    """Matrices of one shape, so many that they take what is multiplied at once."""
    of_shape: dict[torch.Size, list[_Matrix]] = defaultdict(list)
    for matrix in matrices:
        of_shape[matrix.weight.shape].append(matrix)
    for shape, same in of_shape.items():
        count = max(1, _together(same[0].weight.device) // shape.numel())
        yield from (same[start : start + count] for start in range(0, len(same), count))


def _together(device: torch.device) -> int:
    """Numbers that are made orthogonal at once: 64 MiB, or on a CPU, which multiplies one matrix
    faster than many, those of one."""
    return 1 << 24 if device.type == "cuda" else 0


def _summed(pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat matrices of the pieces that ranks share, with the elements of all ranks."""
    sizes = [piece.shape.numel() for piece in pieces]
    flat = tensors[0].new_zeros(sum(sizes))
    matrices = list(torch.split(flat, sizes))
    for piece, matrix, tensor in zip(pieces, matrices, tensors, strict=True):
        matrix[piece.start : piece.start + piece.length] = tensor
    dist.all_reduce(flat)
    return matrices


def orthogonal(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, about, times the factor that makes them as large as an
    update of AdamW: singular values between 0.7 and 1.2 of one.

    Args:
        update: [..., rows, columns].
    """
    rows, columns = update.shape[-2:]
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    made: Tensor = update / (norm + _EPSILON)
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
    return {
        parameter
        for name, parameter in blocks.named_parameters()
        if parameter.ndim == 2 and parameter not in looked_up and not is_bias(name)
    }


def is_bias(name: str) -> bool:
    """Whether a parameter is added, be it one vector or, of experts that are stacked, one each."""
    return name.rpartition(".")[2].endswith("bias")
