"""Every op in a CUDA graph, and again: replays give what an eager call gives, and the same bits."""

from __future__ import annotations

from inspect import isfunction

import fastkd_kernels
import pytest
import torch
from torch import Tensor

from benchmarks.calls import MAKERS, Call, make_call
from benchmarks.device import graph_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WORKLOADS = {
    "attention": "bert-base-to-tinybert-4-128",
    "hidden": "bert-base-to-tinybert-4",
    "indexer": "indexer-gqa-2048",
    "logits": "logits-32k-2048",
    "relation": "minilm-6-to-3-128",
}
DTYPES = [torch.float32, torch.bfloat16]


def small_call(op: str, dtype: torch.dtype) -> Call:
    pairs = 1 if op == "logits_divergence" else 2
    workload = WORKLOADS[op.split("_")[0]]
    return make_call(op, workload, pairs, device="cuda", dtype=dtype, tokens=150)


def refill(call: Call, seed: int) -> None:
    """Other values in the same storage."""
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for tensor in call.inputs:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cuda"))


def test_every_op_has_a_call() -> None:
    ops = {name for name in fastkd_kernels.__all__ if isfunction(getattr(fastkd_kernels, name))}
    assert set(MAKERS) == ops


@needs_gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", MAKERS)
def test_a_captured_call_replays_on_new_inputs(op: str, dtype: torch.dtype, backward: bool) -> None:
    call = small_call(op, dtype)

    def step() -> list[Tensor]:
        if backward:
            return call.step()
        with torch.no_grad():
            return [call.losses()]

    graph, made = graph_of(step)
    for seed in (1, 2):
        refill(call, seed)
        # what it allocates may lie where the captured call's has been
        expected = step()
        graph.replay()
        torch.cuda.synchronize()
        for given, wanted in zip(made, expected, strict=True):
            torch.testing.assert_close(given, wanted)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", MAKERS)
def test_a_call_repeats_bit_for_bit(op: str, dtype: torch.dtype) -> None:
    call = small_call(op, dtype)
    first = call.step()
    for _ in range(3):
        assert all(map(torch.equal, first, call.step()))
