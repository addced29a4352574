"""The kernels of attention_divergence on the named workloads; relations run the same ones."""

from collections.abc import Iterator
from typing import get_args

import torch
from fastkd_kernels.attention_divergence_backward_kernels import key_slopes, query_slopes
from fastkd_kernels.attention_divergence_kernels import stream_rows
from fastkd_kernels.attention_divergence_launch import divergence_launch
from fastkd_kernels.attention_divergence_triton import backward_types, forward_types
from fastkd_kernels.types import DivergenceKind

from benchmarks.machine_code import POINTERS, Job
from benchmarks.workloads import ATTENTION, AttentionWorkload

WORKLOADS = tuple(ATTENTION.values())
# small heads with every kind, and wide causal heads, which need blocks of their own
QUICK = ("minilm-6-to-3-512", "llama-like-1024")


def jobs(work: AttentionWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    dtypes = (dtype, dtype)
    shared = {
        "ALIGN": 16 // dtype.itemsize if work.dims[0] * dtype.itemsize % 16 == 0 else 1,
        "TARGET_ALIGN": 16 // dtype.itemsize,
        "HAS_MASK": True,
        "CAUSAL": work.causal,
        "WINDOWED": False,
    }
    for kind in get_args(DivergenceKind):
        launch = divergence_launch("rows", kind, work.dims, dtypes, on)
        types = forward_types(*dtypes, kind)
        constants = {**shared, **launch.constants, **types, "WRITE_STATS": True}
        pointers = {name: "*fp32" for name in ("scales", "stats", "partials")}
        yield Job(f"{kind}_forward", stream_rows, constants, pointers, *launch[1:])
        pointers = {name: "*fp32" for name in ("scales", "stats", "upstream")}
        pointers["gradient"] = POINTERS[dtype]
        for part, kernel in (("query", query_slopes), ("key", key_slopes)):
            launch = divergence_launch(part, kind, work.dims, dtypes, on)
            constants = {**shared, **launch.constants, **backward_types(*dtypes, kind)}
            yield Job(f"{kind}_{part}", kernel, constants, pointers, *launch[1:])
