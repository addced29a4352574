"""The kernels of attention_divergence on the named workloads; relations run the same ones."""

import math
from collections.abc import Iterator
from typing import get_args

import torch
from fastkd_kernels import AttentionDivergenceKind
from fastkd_kernels.attention_divergence.short_kernel import _short_kernel
from fastkd_kernels.attention_divergence.triton_kernels import (
    _dk_kernel,
    _dq_kernel,
    _rows_kernel,
)
from fastkd_kernels.attention_divergence.triton_path import (
    divergence_launch,
    kernel_types,
    row_stats,
    short_launch,
    takes_short,
)
from fastkd_kernels.common.rescale import waiting_dtype

from benchmarks.machine_code import POINTERS, Job, job_of
from benchmarks.workloads import ATTENTION, AttentionWorkload

# Gemma 2 caps scores; GPT-OSS has sinks, and a window in every other layer
CAPPED = AttentionWorkload("gemma-2-like", 0, 0, 8, (4, 4), 1024, (256, 256), causal=True)
SUNK = AttentionWorkload("gpt-oss-like", 0, 0, 64, (8, 8), 1024, (64, 64), causal=True)
WORKLOADS = (*ATTENTION.values(), CAPPED, SUNK)
# small heads with every kind, wide causal heads, which need blocks of their own, and sinks; capped
# heads of 256 hold too few rows for the newest tensor cores, so a test of their own compiles them
QUICK = ("minilm-6-to-3-128", "minilm-6-to-3-512", "llama-like-1024", SUNK.name)
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
        "MASKED": True,
        "CAUSAL": work.causal,
        **{name: form.get(name, False) for name in ("WINDOWED", "STUDENT_CAP", "TEACHER_CAP")},
        **kernel_types(*dtypes),
    }
    sink = {"SINK": form.get("SINK", False)}
    launched = {"capped": shared["STUDENT_CAP"] or shared["TEACHER_CAP"], "sunk": sink["SINK"]}
    numbers = dict.fromkeys(("scales", "caps", "sinks", "stats", "weights"), "*fp32")
    numbers |= dict.fromkeys(("partials", "sink_partials"), "*fp32")
    numbers |= dict.fromkeys(("query_grad", "key_grad"), POINTERS[waiting_dtype(dtype)])
    layouts = {"QUERY_TOKENS_FIRST": True, "KEY_TOKENS_FIRST": True}
    for kind in get_args(AttentionDivergenceKind):
        if takes_short(work.tokens, work.dims, dtypes, on):
            launch = short_launch(work.tokens, work.dims, dtypes, on)
            flags = {**shared, **launch.constants, **sink, **layouts}
            flags |= {"KIND": kind, "NEED_GRAD": True}
            yield job_of(f"{kind}_short", _short_kernel, flags, numbers, launch)
            continue
        of_keys = "kl" if kind == "cross_entropy" else kind
        written = {"WRITE_STATS": True, "WRITE_VALUES": row_stats(kind) == 5}
        for part, kernel, flags in (
            ("rows", _rows_kernel, {**sink, **written, "KIND": kind}),
            ("dq", _dq_kernel, {**sink, "KIND": kind, "QUERY_TOKENS_FIRST": True}),
            ("dk", _dk_kernel, {"KIND": of_keys, "KEY_TOKENS_FIRST": True}),
        ):
            launch = divergence_launch(part, kind, work.dims, dtypes, on, **launched)
            constants = {**shared, **launch.constants, **flags, "STATS": row_stats(kind)}
            yield job_of(f"{kind}_{part}", kernel, constants, numbers, launch)
