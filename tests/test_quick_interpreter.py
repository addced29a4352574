"""The interpreter of the kernel tests against Triton's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastkd_kernels import attention_divergence, attention_score_mse, hidden_mse, logits_divergence
from kernel_cases import attention_states, hidden_case, leaves_of, masks
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
    hidden = hidden_case(2, 2, 9, (4, 5), "shared+bias", torch.float16).run(hidden_mse, **options)
    return [total, *torch.autograd.grad(total, [*leaves_of(states[0]), logits[0]]), *hidden]


def test_gives_the_bits_of_tritons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    patched: list[Any] = []

    def counted(patch: Callable[[Any], Any]) -> None:
        patched.clear()
        monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: patched.append(fn) or patch(fn))

    # the second time, all is known
    first = values()
    counted(interpreter._patch_lang)
    quick = values()
    launches = len(patched)
    assert all(map(torch.equal, first, quick))
    for (owner, name), own in REPLACED.items():
        monkeypatch.setattr(owner, name, own)
    counted(patch_language)
    assert all(map(torch.equal, quick, values()))
    # if not, Triton repeats it no longer and the helper can go
    assert len(patched) > 5 * launches > 0


@triton.jit
def _kernel(left, right, made, constant, size: tl.constexpr):
    offset = tl.program_id(0) * size + tl.arange(0, size)
    x, y = tl.load(left + offset), tl.load(right + offset)
    # of a value with itself first, where operands can't be told apart
    tl.store(made + offset, x * x)
    tl.store(made + 4 * size + offset, x * y)
    tl.store(made + 8 * size + offset, x / constant)
    # what stands in for a masked value decides, if it is one number
    first = tl.load(left + tl.program_id(0) * size)
    other = tl.load(right, mask=first > 9.0, other=first)
    tl.store(made + 12 * size + offset, x + other)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_types_decide_and_values_do_not() -> None:
    left, right = torch.arange(16.0), torch.arange(16.0) + 20
    for constant in (0.0, -0.0, 2.0, 4.0):
        made = torch.empty(64)
        _kernel[(4,)](left, right, made, constant, size=4)
        first = left.view(4, 4)[:, :1]
        other = torch.where(first > 9, 20.0, first).expand(4, 4).flatten()
        expected = torch.cat([left * left, left * right, left / constant, left + other])
        assert torch.equal(made.nan_to_num(), expected.nan_to_num())
