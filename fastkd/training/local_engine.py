"""The engine of a single process: what DeepSpeed's does there, without paying for shards.

On one rank nothing is reduced and nothing is sharded, but ZeRO still copies every gradient into
flat buffers and walks its hooks. Here gradients go to torch's fused AdamW as autograd leaves them:
the norm by `foreach`, clipping inside the update, one call for each group. It has what a run uses
of DeepSpeed's engine, and its numbers: bf16 weights are copies of fp32 masters that start from
weights rounded to bf16, gradients of several micro-batches add up in fp32, and a parameter that a
step doesn't reach has a gradient of zero, so that its moments and its decay go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

# as torch.nn.utils.clip_grad_norm_ and DeepSpeed have it
_CLIP_EPSILON = 1e-6
# numbers
_ALIGNMENT = 64


class LocalEngine:
    """A module, its optimiser and its schedule on the one device of a run.

    No step is waited for: an update whose gradient is not finite is left out on the device, and the
    host learns of it when it asks for the norm.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.AdamW,
        scheduler: LRScheduler,
        *,
        accumulation: int,
        batch_size: int,
        max_grad_norm: float,
        bf16: bool,
        monitor: Any = None,
    ) -> None:
        """Take a module over.

        Args:
            module: on its device, in fp32; with `bf16` it is turned into bf16.
            optimizer: fused, over those of its parameters that train; with `bf16` it gets masters
                in their place.
            scheduler: of that optimiser.
            accumulation: micro-batches of a step.
            batch_size: its rows.
            max_grad_norm: the norm over all gradients is clipped to this; 0 for never.
            bf16: whether to compute in bf16.
            monitor: one of DeepSpeed's, if metrics go to a tracker.
        """
        self.module = module
        self.optimizer: Any = optimizer
        self.lr_scheduler = scheduler
        self.monitor = monitor
        self.global_steps = 0
        self.global_samples = 0
        """Counted for an engine of DeepSpeed that goes on from a checkpoint of this one."""
        self.skipped_steps = 0
        """Steps whose gradient was not finite, as of the last `get_global_grad_norm`."""
        self._accumulation = accumulation
        self._batch_size = batch_size
        self._max_grad_norm = max_grad_norm
        self._micro_batches = 0
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]
        device = self._trained[0].device
        self._norm = torch.zeros((), device=device)
        self._skipped = torch.zeros((), device=device)
        self._masters = _Masters(module, optimizer, accumulation) if bf16 else None
        self._held = False

    def hold_gradients(self) -> None:
        """Let every gradient stay where it is from now on: a recorded backward adds to it there."""
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        self._held = True

    @property
    def masters(self) -> Mapping[nn.Parameter, Tensor]:
        """By parameter what the optimiser updates: itself, or its fp32 master."""
        updated = self._trained if self._masters is None else self._masters.weights
        return dict(zip(self._trained, updated, strict=True))

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch to that of the step, which is their mean."""
        self.differentiate(loss)
        self.take_gradients()

    def differentiate(self, loss: Tensor) -> None:
        """Let autograd leave the gradient of a micro-batch: the part of `backward` that a graph can
        record, as it is the same for all of a step."""
        torch.autograd.backward(loss / self._accumulation)

    def take_gradients(self) -> None:
        """Add what autograd left to the gradient of the step."""
        if self._masters is not None:
            self._masters.add_gradients(self._micro_batches % self._accumulation == 0)
            self._clear_gradients()

    def step(self) -> None:
        """Count a micro-batch, and update the weights after the last one of a step."""
        self._micro_batches += 1
        if self._micro_batches % self._accumulation:
            return
        self._norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._gradients())))
        broken = (~torch.isfinite(self._norm)).float()
        # what torch's GradScaler sets: the update divides by one, and is left out by the other
        self.optimizer.found_inf = broken
        if self._max_grad_norm:
            clip = (self._norm + _CLIP_EPSILON) / self._max_grad_norm
            self.optimizer.grad_scale = clip.clamp(min=1.0)
        self.optimizer.step()
        self._skipped += broken
        self.lr_scheduler.step()
        self.global_steps += 1
        self.global_samples += self._batch_size
        if self._masters is not None:
            self.follow_masters()
        else:
            self._clear_gradients()

    def follow_masters(self) -> None:
        """Make the weights that the module computes with those of the masters."""
        if self._masters is not None:
            self._masters.hand_down()

    def get_global_grad_norm(self) -> float:
        """Norm over all gradients of the last step, before clipping; waits for it."""
        norm, skipped = torch.stack([self._norm, self._skipped]).tolist()
        self.skipped_steps += int(skipped)
        self._skipped.zero_()
        return float(norm)

    def get_lr(self) -> list[float]:
        """Learning rates of the next step, one a group."""
        return [float(rate) for rate in self.lr_scheduler.get_last_lr()]

    def zero_optimization_stage(self) -> int:
        """Nothing is sharded."""
        return 0

    def _clear_gradients(self) -> None:
        if self._held:
            torch._foreach_zero_([p.grad for p in self._trained])
            return
        for parameter in self._trained:
            parameter.grad = None

    def _gradients(self) -> list[Tensor]:
        if self._masters is not None:
            return self._masters.gradients
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self._trained if p.grad is not None]


class _Masters:
    """fp32 weights and gradients of a module that computes in bf16, each in one flat tensor."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int
    ) -> None:
        """Turn a module into bf16 and let the optimiser update masters of what it has."""
        module.to(torch.bfloat16)
        groups = optimizer.param_groups
        self._lower = [p for group in groups for p in group["params"]]
        numbers = sum(_padded(p.numel()) for p in self._lower)
        flat = torch.zeros(3 if accumulation > 1 else 2, numbers, device=self._lower[0].device)
        self.weights = self._views(flat[0])
        self._flat = flat[1]
        self.gradients = self._views(flat[1])
        # of one micro-batch: `foreach` has no sum of two dtypes
        self._fresh_flat = flat[-1]
        self._fresh = self._views(flat[-1])
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self._lower)
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        of = dict(zip(self._lower, self.weights, strict=True))
        for group in groups:
            group["params"] = [of[p] for p in group["params"]]

    @torch.no_grad()
    def add_gradients(self, first: bool) -> None:
        """Take the bf16 gradients of a micro-batch, the `first` of a step or a later one."""
        into, flat = (self.gradients, self._flat) if first else (self._fresh, self._fresh_flat)
        pairs = [(g, p.grad) for g, p in zip(into, self._lower, strict=True) if p.grad is not None]
        if len(pairs) < len(into):
            flat.zero_()
        torch._foreach_copy_([g for g, _ in pairs], [fresh for _, fresh in pairs])
        if not first:
            self._flat.add_(flat)

    @torch.no_grad()
    def hand_down(self) -> None:
        """Round the masters into the module."""
        torch._foreach_copy_(self._lower, self.weights)

    def _views(self, flat: Tensor) -> list[Tensor]:
        views, start = [], 0
        for parameter in self._lower:
            # cut one by one: what `split` returns may not be written in place
            views.append(flat.narrow(0, start, parameter.numel()).view(parameter.shape))
            start += _padded(parameter.numel())
        return views


def _padded(numbers: int) -> int:
    """Room that lets the next tensor start where wide loads can."""
    return -(-numbers // _ALIGNMENT) * _ALIGNMENT
