"""The kernels of indexer_divergence on the named workloads."""

import math
from collections.abc import Iterator

import torch
from fastkd_kernels.indexer_divergence.triton_kernels import (
    _bwd_dk_kernel,
    _bwd_dq_kernel,
    _head_sums_kernel,
    _rows_kernel,
    _scores_kernel,
)
from fastkd_kernels.indexer_divergence.triton_path import (
    indexer_launch,
    row_launch,
    small,
    type_constants,
    unit_dtype,
)

from benchmarks.machine_code import POINTERS, Job
from benchmarks.workloads import INDEXER, IndexerWorkload

# Gemma 2 caps scores
CAPPED = IndexerWorkload("indexer-capped-1024", 0, 0, 64, 8, 4, 1024, (128, 256))
WORKLOADS = (*INDEXER.values(), CAPPED)
# heads that are multiplied whole, and wide ones in chunks, plain and capped
QUICK = ("indexer-gqa-2048", "indexer-mla-2048", CAPPED.name)


def jobs(work: IndexerWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    dtypes, total = (dtype, dtype), torch.float32
    shared = {
        **type_constants(*dtypes, dtype, total),
        "ALIGN": math.gcd(16 // dtype.itemsize, work.dims[0]),
        "TEACHER_ALIGN": math.gcd(16 // dtype.itemsize, work.dims[1]),
        "HAS_MASK": True,
        "CAUSAL": work.causal,
        "CAP": work == CAPPED,
        "SMALL": small(total),
        "NEED_GRAD": True,
    }
    pointers = dict.fromkeys(
        ("scales", "caps", "sums", "workspace", "values", "to_weights", "partials"), "*fp32"
    )
    pointers["to_query"] = POINTERS[unit_dtype(dtype, total)]
    for name, kernel in (
        ("head_sums", _head_sums_kernel),
        ("scores", _scores_kernel),
        ("rows", _rows_kernel),
        ("bwd_dq", _bwd_dq_kernel),
        ("bwd_dk", _bwd_dk_kernel),
    ):
        launch = row_launch() if name == "rows" else indexer_launch(name, work.dims, dtypes, on)
        known = {**shared, **launch.constants}
        constants = {word: known[word] for word in kernel.arg_names if word in known}
        yield Job(name, kernel, constants, pointers, *launch[1:])
