"""The kernels of attention_score_mse on the named workloads."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from fastkd_kernels.attention_score_mse import gram_kernels, triton_kernels
from fastkd_kernels.attention_score_mse.op import choose_algorithm
from fastkd_kernels.attention_score_mse.triton_path import (
    gram_constants,
    gram_launch,
    gram_types,
    one_launch,
    scan_launch,
    tile_launch,
    tile_types,
)

from benchmarks.machine_code import POINTERS, Job
from benchmarks.workloads import ATTENTION, AttentionWorkload

WORKLOADS = tuple(ATTENTION.values())
Dtypes = tuple[torch.dtype, torch.dtype]
# a short, a long and a causal shape: every kernel, both forms of the Gram algebra
QUICK = ("bert-base-to-tinybert-4-128", "bert-base-to-tinybert-4-2048", "llama-like-8192")


def jobs(work: AttentionWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    dtypes = (dtype, dtype)
    shared = {
        "ALIGN": math.gcd(16 // dtype.itemsize, work.dims[0]),
        "TEACHER_ALIGN": 16 // dtype.itemsize,
        "HAS_MASK": True,
    }
    chosen = choose_algorithm(work.tokens, *work.dims, causal=work.causal, backend="triton")
    if chosen == "tiles" or work.causal:
        yield from _tile_jobs(work, shared, dtypes, on)
    if chosen == "gram":
        yield from _gram_jobs(work, shared, dtypes, on)


def _tile_jobs(
    work: AttentionWorkload, shared: dict[str, Any], dtypes: Dtypes, on: str
) -> Iterator[Job]:
    launch = tile_launch(work.tokens, work.dims, dtypes, on)
    constants = {**shared, **tile_types(*dtypes), **launch.constants, "CAUSAL": work.causal}
    whole = one_launch(work.tokens, launch)
    by_key = {**constants, "WRITE_QUERY": whole, "WRITE_KEY": True}
    pointers = {name: "*fp32" for name in ("scales", "query_grad", "key_grad", "partials")}
    yield Job("by_key", triton_kernels._tiles_fwd_kernel, by_key, pointers, *launch[1:])
    if not whole:
        pointers = {name: "*fp32" for name in ("scales", "query_grad")}
        yield Job("by_query", triton_kernels._tiles_bwd_dq_kernel, constants, pointers, *launch[1:])


def _gram_jobs(
    work: AttentionWorkload, shared: dict[str, Any], dtypes: Dtypes, on: str
) -> Iterator[Job]:
    launch = gram_launch(work.dims, dtypes, on)
    types = gram_types(*dtypes, work.dims[0] == work.dims[1])
    for side, of in enumerate(("queries", "keys")):
        blocks = gram_constants(launch.constants, "BLOCK")
        constants = {**shared, **types, **blocks, "SIDE": side}
        pointers = {"scales": "*fp32", "grams": "*fp32"}
        yield Job(f"gram of {of}", gram_kernels._gram_kernel, constants, pointers, *launch[1:])
        blocks = gram_constants(launch.constants, "APPLY")
        constants = {**shared, **types, **blocks, "SIDE": side, "ACCUMULATE": work.causal}
        pointers = {name: "*fp32" for name in ("scales", "factors", "upstream")}
        # causal gradients are sums in fp32, of tiles and of this
        pointers["gradient"] = "*fp32" if work.causal else POINTERS[dtypes[0]]
        yield Job(f"apply to {of}", gram_kernels._gram_bwd_kernel, constants, pointers, *launch[1:])
        if work.causal:
            scan = scan_launch()
            constants = {"SUM_TYPE": types["SUM_TYPE"], "REVERSE": side == 0, **scan.constants}
            yield Job(
                f"scan of {of}", gram_kernels._scan_kernel, constants, {"grams": "*fp32"}, *scan[1:]
            )
