"""What an optimiser updates, as one flat tensor for each of its groups.

AdamW treats every number alike, so a group of a hundred parameters may as well be one: the host
then starts a few kernels where it would walk a hundred tensors several times over. Parameters are
views; the gradients of those that compute in bf16 are added up in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

# numbers
_ALIGNMENT, _ROW = 16, 4096


class FlatWeights:
    """fp32 weights and gradients of all that an optimiser updates.

    Where the module computes in fp32, its parameters are views of these weights. Where it computes
    in bf16, they are views of another flat tensor, which is rounded from them after every update.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the parameters of an optimiser over, and give it others to update.

        Args:
            optimizer: has made no step; its parameters are all of one dtype. It updates each
                number by itself, but for groups with `muon` set, which keep their matrices.
        """
        groups = optimizer.param_groups
        self._parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        *starts, end = accumulate((_padded(p.numel()) for p in self._parameters), initial=0)
        self._starts = dict(zip(self._parameters, starts, strict=True))
        device, dtype = self._parameters[0].device, self._parameters[0].dtype
        length = _padded(end, _ROW)
        self._weights, self._gradients = torch.zeros(2, length, device=device).unbind()
        with torch.no_grad():
            torch._foreach_copy_(self._views(self._weights), list(self._parameters))
        self._computed = self._weights.to(dtype)
        for parameter, view in zip(self._parameters, self._views(self._computed), strict=True):
            parameter.data = view
        self._held: Tensor | None = None
        self._into = self._views(self._gradients)
        self._fresh: tuple[Tensor, list[Tensor]] | None = None
        self.places: dict[nn.Parameter, tuple[Tensor, int | None]] = {}
        """By parameter the tensor that is updated, and where in it the parameter starts; `None`
        where the tensor is that of the parameter alone."""
        matrices = dict(zip(self._parameters, self._views(self._weights), strict=True))
        for group in groups:
            own: list[nn.Parameter] = group["params"]
            if group.get("muon") or not own:
                group["params"] = [matrices[parameter] for parameter in own]
                self.places |= {parameter: (matrices[parameter], None) for parameter in own}
                continue
            begin = self._starts[own[0]]
            end = self._starts[own[-1]] + _padded(own[-1].numel())
            segment = self._weights[begin:end]
            segment.grad = self._gradients[begin:end]
            group["params"] = [segment]
            self.places |= {
                parameter: (segment, self._starts[parameter] - begin) for parameter in own
            }
        for parameter, gradient in zip(self._parameters, self._into, strict=True):
            matrices[parameter].grad = gradient

    def hold_gradients(self) -> None:
        """Let the gradients of the module stay where they are from now on."""
        self._held = torch.zeros_like(self._computed) if self._rounds else self._gradients
        for parameter, view in zip(self._parameters, self._views(self._held), strict=True):
            parameter.grad = view

    @torch.no_grad()
    def add_gradients(self, first: bool) -> None:
        """Take the gradients of a micro-batch, the `first` of a step or a later one."""
        if self._held is None:
            self._gather(first)
        elif self._rounds:
            self._gradients.copy_(self._held) if first else self._gradients.add_(self._held)
            self._held.zero_()

    @torch.no_grad()
    def follow(self) -> None:
        """Let the module compute with the weights of an update, and gradients start anew."""
        if self._rounds:
            self._computed.copy_(self._weights)
        else:
            self._gradients.zero_()

    def gradient_norm(self) -> Tensor:
        """Over all gradients, fp32 []."""
        return _norm_of_rows(self._gradients)

    @property
    def _rounds(self) -> bool:
        return self._computed is not self._weights

    def _gather(self, first: bool) -> None:
        """Take gradients from where autograd left them."""
        if first:
            flat, views = self._gradients, self._into
        else:
            # `foreach` has no sum of two dtypes
            if self._fresh is None:
                fresh = torch.zeros_like(self._gradients)
                self._fresh = fresh, self._views(fresh)
            flat, views = self._fresh
        pairs = [(v, p.grad) for v, p in zip(views, self._parameters, strict=True)]
        found = [(view, gradient) for view, gradient in pairs if gradient is not None]
        if len(found) < len(pairs):
            flat.zero_()
        torch._foreach_copy_([view for view, _ in found], [gradient for _, gradient in found])
        if not first:
            self._gradients.add_(flat)
        for parameter in self._parameters:
            parameter.grad = None

    def _views(self, flat: Tensor) -> list[Tensor]:
        # cut one by one: what `split` returns may not be written in place
        return [
            flat.narrow(0, start, parameter.numel()).view(parameter.shape)
            for parameter, start in self._starts.items()
        ]


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Over all numbers of several tensors, fp32 []."""
    # many small ones in one call
    small = [tensor for tensor in tensors if not _loses_digits(tensor)]
    parts = [] if not small else list(torch._foreach_norm(small))
    for tensor in filter(_loses_digits, tensors):
        flat = tensor.flatten()
        whole = flat.numel() // _ROW * _ROW
        parts += [_norm_of_rows(flat[:whole]), torch.linalg.vector_norm(flat[whole:])]
    found: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return found


def _loses_digits(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() > _ROW


def _norm_of_rows(flat: Tensor) -> Tensor:
    # the sum that torch makes on a CPU loses digits over millions of numbers
    rows = torch.linalg.vector_norm(flat.view(-1, _ROW), dim=1)
    found: Tensor = torch.linalg.vector_norm(rows)
    return found


def _padded(numbers: int, unit: int = _ALIGNMENT) -> int:
    """The next multiple; of `_ALIGNMENT`, where wide loads can start."""
    return -(-numbers // unit) * unit
