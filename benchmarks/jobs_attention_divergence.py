"""The kernels of attention_divergence on the named workloads; relations run the same ones."""

import math
from collections.abc import Iterator
from typing import get_args

import torch
from fastkd_kernels import AttentionDivergenceKind
from fastkd_kernels.attention_divergence.triton_kernels import (
    _bwd_dk_kernel,
    _bwd_dq_kernel,
    _fwd_kernel,
)
from fastkd_kernels.attention_divergence.triton_path import (
    backward_types,
    divergence_launch,
    forward_types,
)

from benchmarks.machine_code import POINTERS, Job
from benchmarks.workloads import ATTENTION, AttentionWorkload

# Gemma 2 caps scores; GPT-OSS has sinks, and a window in every other layer
CAPPED = AttentionWorkload("gemma-2-like", 0, 0, 8, (4, 4), 1024, (256, 256), causal=True)
SUNK = AttentionWorkload("gpt-oss-like", 0, 0, 64, (8, 8), 1024, (64, 64), causal=True)
WORKLOADS = (*ATTENTION.values(), CAPPED, SUNK)
# small heads with every kind, wide causal heads, which need blocks of their own, and sinks; capped
# heads of 256 hold too few rows for the newest tensor cores, so a test of their own compiles them
QUICK = ("minilm-6-to-3-512", "llama-like-1024", SUNK.name)
# the flags of the kernels that differ from those of a plain model
FORMS = {
    CAPPED.name: {"STUDENT_CAP": True, "TEACHER_CAP": True},
    SUNK.name: {"SINK": True, "WINDOWED": True},
}


def jobs(work: AttentionWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    dtypes = (dtype, dtype)
    form = FORMS.get(work.name, {})
    shared = {
        "ALIGN": math.gcd(16 // dtype.itemsize, work.dims[0]),
        "TEACHER_ALIGN": 16 // dtype.itemsize,
        "HAS_MASK": True,
        "CAUSAL": work.causal,
        **{name: form.get(name, False) for name in ("WINDOWED", "STUDENT_CAP", "TEACHER_CAP")},
    }
    sink = {"SINK": form.get("SINK", False)}
    launched = {"capped": shared["STUDENT_CAP"] or shared["TEACHER_CAP"], "sunk": sink["SINK"]}
    for kind in get_args(AttentionDivergenceKind):
        launch = divergence_launch("fwd", kind, work.dims, dtypes, on, **launched)
        types = forward_types(*dtypes, kind)
        constants = {**shared, **launch.constants, **types, **sink, "WRITE_STATS": True}
        pointers = dict.fromkeys(("scales", "caps", "sinks", "stats", "partials"), "*fp32")
        yield Job(f"{kind}_forward", _fwd_kernel, constants, pointers, *launch[1:])
        pointers = dict.fromkeys(("scales", "caps", "stats", "upstream"), "*fp32")
        pointers["gradient"] = POINTERS[dtype]
        with_sink = {**pointers, **dict.fromkeys(("sinks", "sink_partials"), "*fp32")}
        for part, kernel, flags, types_of in (
            ("query", _bwd_dq_kernel, sink, with_sink),
            ("key", _bwd_dk_kernel, {}, pointers),
        ):
            launch = divergence_launch(f"bwd_d{part[0]}", kind, work.dims, dtypes, on, **launched)
            constants = {**shared, **launch.constants, **backward_types(*dtypes, kind), **flags}
            yield Job(f"{kind}_{part}", kernel, constants, types_of, *launch[1:])
