"""The engine of a single process: what DeepSpeed's does there, without paying for shards.

On one rank nothing is reduced and nothing is sharded, but ZeRO still copies every gradient into
flat buffers and walks its hooks. Here gradients go to torch's fused AdamW as autograd leaves them:
the norm by `foreach`, clipping inside the update, one call for each group. Where gradients have a
place of their own, in bf16 and for recorded steps, weights are flat (`flat_weights.py`). It has
what a run uses of DeepSpeed's engine, and its numbers: bf16 weights are copies of fp32 masters that
start from weights rounded to bf16, gradients of several micro-batches add up in fp32, and a
parameter that a step doesn't reach has a gradient of zero, so that its moments and its decay go on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fastkd.models.half import round_parameters
from fastkd.training.flat_weights import FlatWeights, norm_of

# as torch.nn.utils.clip_grad_norm_ and DeepSpeed have it
_CLIP_EPSILON = 1e-6


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
            module: on its device, in fp32; with `bf16` its parameters are turned into bf16.
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
        self._ends: bool | None = None
        self.trained: list[nn.Parameter] = [
            p for group in optimizer.param_groups for p in group["params"]
        ]
        device = self.trained[0].device
        self._norm = torch.zeros((), device=device)
        self._skipped = torch.zeros((), device=device)
        self.flat: FlatWeights | None = None
        """What the optimiser updates, where that is not the parameters themselves."""
        if bf16:
            round_parameters(module)
            self.flat = FlatWeights(optimizer)

    def hold_gradients(self) -> None:
        """Let every gradient stay where it is from now on: a recorded backward adds to it there.
        Before the first step."""
        if self.flat is None:
            self.flat = FlatWeights(self.optimizer)
        self.flat.hold_gradients()

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say of every micro-batch before its forward whether it is the last of its step, where
        steps have other numbers of them than `accumulation`, by which gradients are divided."""
        self._ends = is_boundary

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
        if self.flat is not None:
            self.flat.add_gradients(self._micro_batches == 0)

    def step(self) -> None:
        """Count a micro-batch, and update the weights after the last one of a step."""
        self._micro_batches += 1
        ends = self._micro_batches == self._accumulation if self._ends is None else self._ends
        if not ends:
            return
        self._micro_batches = 0
        self._norm = self._gradient_norm()
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
        if self.flat is None:
            for parameter in self.trained:
                parameter.grad = None
        else:
            self.flat.follow()

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

    def _gradient_norm(self) -> Tensor:
        if self.flat is not None:
            return self.flat.gradient_norm()
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return norm_of([p.grad for p in self.trained if p.grad is not None])
