"""Liger-Kernel's fused heads and divergence, where that is installed, in place of ours."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from fastkd_kernels import LogitsHead
from torch import Tensor

# what its generalised JSD is at these betas
BETAS = {"kl": 0.0, "js": 0.5}


def is_installed() -> bool:
    return find_spec("liger_kernel") is not None


def liger_step(
    student: LogitsHead, teacher: LogitsHead, leaves: Sequence[Tensor], kind: str
) -> Callable[[], list[Tensor]]:
    """Loss and gradients of the leaves, the student's states and weight, by `fused_linear_jsd`."""
    found = import_module("liger_kernel.transformers.fused_linear_jsd")
    module = found.LigerFusedLinearJSD(jsd_beta=BETAS[kind], temperature=1.0)

    def run() -> list[Tensor]:
        own, other = (head.hidden.flatten(0, 1) for head in (student, teacher))
        loss = module(own, student.weight, other, teacher.weight, None)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return run
