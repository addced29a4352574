"""The kernels of attention_score_mse on the named workloads."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from fastkd_kernels.attention_score_mse import gram_kernels, triton_kernels
from fastkd_kernels.attention_score_mse.op import choose_algorithm
from fastkd_kernels.attention_score_mse.short_kernel import _short_kernel
from fastkd_kernels.attention_score_mse.triton_path import (
    gradient_dtype,
    gram_constants,
    gram_launch,
    gram_types,
    scan_launch,
    short_launch,
    takes_short,
    tile_launch,
    tile_types,
)

from benchmarks.machine_code import POINTERS, Job, job_of
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
        yield from _tile_jobs(work, shared, dtypes, on, chosen)
    if chosen == "gram":
        yield from _gram_jobs(work, shared, dtypes, on)


def _tile_jobs(
    work: AttentionWorkload, shared: dict[str, Any], dtypes: Dtypes, on: str, algorithm: str
) -> Iterator[Job]:
    made = POINTERS[gradient_dtype(dtypes[0], algorithm)]
    pointers = dict.fromkeys(("scales", "factor", "partials"), "*fp32")
    pointers |= dict.fromkeys(("query_grad", "key_grad"), made)
    shared = {**shared, **tile_types(*dtypes), "CAUSAL": work.causal}
    flags = ("WRITE_KEY", "NEED_GRAD", "QUERY_TOKENS_FIRST", "KEY_TOKENS_FIRST")
    shared |= dict.fromkeys(flags, True)
    if algorithm == "tiles" and takes_short(work.tokens, work.dims, dtypes, on):
        launch = short_launch(work.tokens, work.dims, dtypes, on)
        yield job_of("short", _short_kernel, {**shared, **launch.constants}, pointers, launch)
        return
    for name, part, kernel in (
        ("by_key", "fwd", triton_kernels._tiles_fwd_kernel),
        ("by_query", "dq", triton_kernels._tiles_bwd_dq_kernel),
    ):
        launch = tile_launch(part, work.tokens, work.dims, dtypes, on)
        yield job_of(name, kernel, {**shared, **launch.constants}, pointers, launch)


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
        constants["TOKENS_FIRST"] = True
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
