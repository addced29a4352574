"""The interpreter of the kernel tests against Triton's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import attention_divergence, attention_score_mse, logits_divergence
from kernel_cases import attention_states, leaves_of, masks
from quick_interpreter import REPLACED, patch_language
from torch import Tensor
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


def values() -> list[Tensor]:
    """Of kernels that call functions of several modules, with reductions and products."""
    states = attention_states(1, 1, 2, 9, (4, 5), kv_heads=(1, 2), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(1, 9, 7, generator=generator).requires_grad_(s) for s in (True, False)]
    options: dict[str, Any] = {"backend": "triton"}
    total = attention_score_mse(*states, key_mask=masks(1, 9), causal=True, **options).sum()
    total = total + attention_divergence(*states, kind="js", window=4, **options).sum()
    total = total + logits_divergence(*logits, kind="kl", **options).sum()
    return [total, *torch.autograd.grad(total, [*leaves_of(states[0]), logits[0]])]


def test_gives_the_bits_of_tritons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    patched: list[Any] = []

    def counted(patch: Callable[[Any], Any]) -> None:
        patched.clear()
        monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: patched.append(fn) or patch(fn))

    counted(interpreter._patch_lang)
    quick = values()
    launches = len(patched)
    for (owner, name), own in REPLACED.items():
        monkeypatch.setattr(owner, name, own)
    counted(patch_language)
    assert all(map(torch.equal, quick, values()))
    # if not, Triton repeats it no longer and the helper can go
    assert len(patched) > 5 * launches > 0
