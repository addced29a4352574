"""The kernels of attention_divergence on the named workloads; relations run the same ones."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

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
# forms that kernels take besides the plain one: soft caps on both sides, attention sinks
CAPS = {"STUDENT_CAP": True, "TEACHER_CAP": True}
SINK = {"SINK": True}
# what the forms are compiled with: the lightest kind and the heaviest, on decoders
FORM_KINDS = ("kl", "js")


def jobs(work: AttentionWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    for kind in get_args(DivergenceKind):
        yield from kernels(work, kind, dtype, on)
    if work.causal:
        for kind in FORM_KINDS:
            yield from kernels(work, kind, dtype, on, CAPS, "_caps")
            # keys' gradients read nothing of a sink but the rows' statistics
            yield from list(kernels(work, kind, dtype, on, SINK, "_sinks"))[:2]


def kernels(
    work: AttentionWorkload,
    kind: str,
    dtype: torch.dtype,
    on: str,
    form: Mapping[str, bool] | None = None,
    name: str = "",
    *,
    windowed: bool = False,
) -> Iterator[Job]:
    """The forward and both backward kernels of one kind, in the plain form or in `form`."""
    dtypes = (dtype, dtype)
    flags = {"STUDENT_CAP": False, "TEACHER_CAP": False, "SINK": False, **(form or {})}
    shared = {
        "ALIGN": 16 // dtype.itemsize if work.dims[0] * dtype.itemsize % 16 == 0 else 1,
        "TARGET_ALIGN": 16 // dtype.itemsize,
        "HAS_MASK": True,
        "CAUSAL": work.causal,
        "WINDOWED": windowed,
        "STUDENT_CAP": flags["STUDENT_CAP"],
        "TEACHER_CAP": flags["TEACHER_CAP"],
    }
    sink = {"SINK": flags["SINK"]}
    floats = ("scales", "caps", "sinks", "stats", "partials", "sink_partials", "upstream")
    pointers: dict[str, str] = dict.fromkeys(floats, "*fp32")
    launch = divergence_launch("rows", kind, work.dims, dtypes, on)
    constants: dict[str, Any] = {**shared, **launch.constants, **forward_types(*dtypes, kind)}
    constants |= {**sink, "WRITE_STATS": True}
    yield Job(f"{kind}_forward{name}", stream_rows, constants, pointers, *launch[1:])
    pointers = {**pointers, "gradient": POINTERS[dtype]}
    for part, kernel, own in (("query", query_slopes, sink), ("key", key_slopes, {})):
        launch = divergence_launch(part, kind, work.dims, dtypes, on)
        constants = {**shared, **launch.constants, **backward_types(*dtypes, kind), **own}
        yield Job(f"{kind}_{part}{name}", kernel, constants, pointers, *launch[1:])
