"""Training attention in bf16 and fp32 on a CPU: torch's fused kernel and plain products, in turn.

`OMP_NUM_THREADS=1 python -m benchmarks.cpu_attention [--output FILE]`. Forward and backward of
`scaled_dot_product_attention` with a mask of padding, over as many tokens at every length. What
`fastkd.training.precision.PLAIN_ATTENTION_TOKENS` rests on.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.machine import machine, report
from benchmarks.timing import paired_seconds

TOKENS, WIDTH = 2048, 384
LENGTHS = (32, 64, 128, 256, 512)
HEAD_SIZES = (32, 64)
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}


def attend(length: int, head: int, dtype: torch.dtype, kernel: SDPBackend) -> Callable[[], None]:
    """Forward and backward of one layer's attention."""
    torch.manual_seed(0)
    shape = TOKENS // length, WIDTH // head, length, head
    states = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    mask = torch.ones(shape[0], 1, length, length, dtype=torch.bool)
    given = torch.ones(shape, dtype=dtype)

    def run() -> None:
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(*states, attn_mask=mask).backward(given)

    return run


def compared(length: int, head: int, precision: str) -> dict[str, Any]:
    """Medians of both kernels, and how many times as long as the plain one the fused one takes."""
    make = partial(attend, length, head, PRECISIONS[precision])
    seconds = paired_seconds({name: make(kernel) for name, kernel in KERNELS.items()}, "cpu")
    pairs = [a / b for a, b in zip(seconds["fused"], seconds["plain"], strict=True)]
    return {
        "ms": {name: round(1e3 * statistics.median(s), 2) for name, s in seconds.items()},
        "fused / plain": [round(quartile, 2) for quartile in statistics.quantiles(pairs, n=4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    cases = {
        f"{precision}, {TOKENS // length} x {length}, heads of {head}": compared(
            length, head, precision
        )
        for precision in PRECISIONS
        for head in HEAD_SIZES
        for length in LENGTHS
    }
    report({"what": "quartiles of pairs", **machine(), "cases": cases}, given.output)


if __name__ == "__main__":
    main()
