"""The kernels of logits_divergence on the named workloads."""

from collections.abc import Iterator
from typing import get_args

import torch
from fastkd_kernels import LogitsDivergenceKind
from fastkd_kernels.logits_divergence import triton_path
from fastkd_kernels.logits_divergence.torch_path import Divergence, Finish
from triton import cdiv

from benchmarks.jobs import Call, Loop, Seen
from benchmarks.recording import Launch, meta
from benchmarks.workloads import LOGITS, LogitsWorkload

WORKLOADS = tuple(LOGITS.values())
QUICK = ("logits-32k-2048",)
# kinds whose gradient needs a sum over the row first
CENTRED = ("reverse_kl", "js", "skew_kl")
PLAIN = Finish()
CAPPED = Finish(0.5, 30.0)


def calls(work: LogitsWorkload, dtype: torch.dtype, count: int) -> Iterator[Call]:
    """Every kind of two heads, then what only some calls have: labels, no gradient, soft caps.

    In fp32 the products are Triton's, with operands aligned or not, and one kind stands for all.
    """
    if dtype.itemsize == 4:
        yield Call("kl", lambda: _run(work, dtype, "kl"))
        odd = work._replace(widths=(work.widths[0] - 1, work.widths[1] - 1))
        yield Call("unaligned", lambda: _run(odd, dtype, "kl"), counted=False)
        return
    for kind in get_args(LogitsDivergenceKind):
        yield Call(kind, lambda kind=kind: _run(work, dtype, kind))
    yield Call("labelled", lambda: _run(work, dtype, "kl", labelled=True), counted=False)
    yield Call("values", lambda: _run(work, dtype, "js", gradient=False), counted=False)
    yield Call("capped", lambda: _run(work, dtype, "js", finish=CAPPED), counted=False)


def _run(
    work: LogitsWorkload,
    dtype: torch.dtype,
    kind: str,
    *,
    labelled: bool = False,
    gradient: bool = True,
    finish: Finish = PLAIN,
) -> None:
    student, teacher = (
        (
            meta(work.batch, work.tokens, width, dtype=dtype),
            meta(work.vocabulary, width, dtype=dtype),
        )
        for width in work.widths
    )
    how = Divergence(kind, 1.0, 0.5, 1.0, work.vocabulary, finish, finish)
    mask = meta(work.batch, work.tokens, dtype=torch.bool) if labelled else None
    labels = meta(work.batch, work.tokens, dtype=torch.int64) if labelled else None
    factors = meta(2 if labelled else 1, dtype=torch.float32)
    looks = (mask is not None, labels is not None, factors.dtype)
    plan = triton_path.sweep(student, teacher, *looks, how, gradient, gradient)
    plan(student, teacher, mask, labels, factors)


def seen(launch: Launch, work: LogitsWorkload, dtype: torch.dtype, count: int) -> Seen:
    given = launch.arguments
    if launch.kernel_name == "_matmul_kernel":
        flags = ("LEFT_TRANSPOSED", "RIGHT_TRANSPOSED")
        name = {(False, True): "logits", (False, False): "hidden_gradient"}.get(
            tuple(given[flag] for flag in flags), "weight_gradient"
        )
        return Seen(name, (Loop(given["part_steps"]),), 0)
    step = Loop(cdiv(given["columns"], given["BLOCK"]))
    # a sweep of a softmax, and the one that takes its place where later logits lie far above
    softmax = (step, Loop(0))
    softmaxes = 2 * (given["KIND"] != "mse")
    sums = given["KIND"] in CENTRED or not given["STORE"]
    loops = softmax * softmaxes + (step,) * sums
    loops += softmax * given["HAS_LABELS"] + (step,) * given["STORE"]
    # rows of fp32 logits start at multiples of 16 bytes
    return Seen("rows", loops, 0, loads=((4 * given["BLOCK"], 16),))
