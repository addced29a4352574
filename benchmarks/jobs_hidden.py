"""The kernels of the ops on hidden states on the named workloads."""

from collections.abc import Iterator
from typing import Any

import torch
from fastkd_kernels.hidden import triton_path
from triton import cdiv

from benchmarks.jobs import Call, Loop, Seen
from benchmarks.recording import Launch, meta
from benchmarks.workloads import HIDDEN, HiddenWorkload

WORKLOADS = tuple(HIDDEN.values())
# with a projection of few columns and of many, and without one
QUICK = ("bert-base-to-tinybert-4", "llama-like", "minilm-6-to-3")
# sum of which columns: the student's width, the teacher's, rows
SUMMED = {"_fwd_kernel": "width", "_bwd_dx_kernel": "teacher_width"}
NAMES = {
    "_bwd_db_kernel": "sums",
    "_fwd_kernel": "residuals",
    "_fwd_dx_kernel": "residuals_and_input_gradient",
    "_bwd_dx_kernel": "input_gradient",
    "_bwd_dw_kernel": "weight_gradient",
    "_unit_fwd_kernel": "unit_residuals",
}


def calls(work: HiddenWorkload, dtype: torch.dtype, count: int) -> Iterator[Call]:
    """hidden_mse and the normalised losses, with a mask."""
    own, target = work.widths
    student, teacher = (
        [meta(work.batch, work.tokens, width, dtype=dtype)] * count for width in work.widths
    )
    weight = [meta(target, own, dtype=dtype)] if own != target else []
    bias = [meta(target, dtype=dtype)] if own != target else []
    mask = meta(work.batch, work.tokens, dtype=torch.bool)
    factor = meta(dtype=torch.float32)

    def run(normalize: bool) -> None:
        states, wanted = (student, teacher, weight, bias), (normalize, True, bool(weight))
        plan = triton_path.hidden_forward(*states, True, factor.dtype, *wanted)
        plan(*states, mask, factor)

    yield Call("mse", lambda: run(False))
    yield Call("normalised", lambda: run(True))


def seen(launch: Launch, work: HiddenWorkload, dtype: torch.dtype, count: int) -> Seen:
    """Read through the table: the chunk's rows, and the weight once."""
    given, name = launch.arguments, launch.kernel_name
    own, target = work.widths
    if name == "_bwd_db_kernel":
        # the residual is read as an argument; its loop is unrolled
        return Seen(NAMES[name], (), 0, loads=_loads(given, name, dtype))
    last, first = given["last"], given["first"]
    loops: tuple[Loop, ...] = ()
    if name == "_bwd_dw_kernel":
        loops = (Loop(cdiv(last - first, given["BLOCK_SUM"])),)
    elif name == "_fwd_dx_kernel":
        sweep = Loop(cdiv(target, given["BLOCK_COLUMN"]))
        loops = (sweep, sweep) if given["NORMALIZE"] else (sweep,)
    elif name in SUMMED and given.get("HAS_WEIGHT", True):
        loops = (Loop(cdiv(given[SUMMED[name]], given["BLOCK_SUM"])),)
    label = NAMES[name]
    # rows that are read through the table, student's and teacher's
    widths = {"_bwd_dx_kernel": 0, "_bwd_dw_kernel": own}.get(name, own + target)
    if name == "_fwd_kernel" and not given["HAS_TEACHER"]:
        label, widths = "projected", own
    if name == "_unit_fwd_kernel" and given["HAS_WEIGHT"]:
        widths = target
    weight = own * target if name in (*SUMMED, "_fwd_dx_kernel") and own != target else 0
    read = (count * (last - first) * widths + weight) * dtype.itemsize
    return Seen(label, loops, read, loads=_loads(given, name, dtype))


def _loads(given: dict[str, Any], name: str, dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    """The tile of rows, and of the weight, of a step; whole rows where they are normalised."""
    size = dtype.itemsize
    if name == "_fwd_dx_kernel":
        columns = given["BLOCK_COLUMN"] * size
        blocks = {"BLOCK_IN": "WEIGHT_ALIGN", "BLOCK_REST": "WEIGHT_ALIGN"}
        blocks["BLOCK_ROW"] = "TEACHER_ALIGN"
        return tuple(
            (given[block] * columns, min(16, given[align] * size))
            for block, align in blocks.items()
            if given[block]
        )
    if name == "_fwd_kernel" and given["HAS_WEIGHT"]:
        step = given["BLOCK_SUM"] * size
        tiles = (("BLOCK_ROW", "ALIGN"), ("BLOCK_COLUMN", "WEIGHT_ALIGN"))
        return tuple((given[block] * step, min(16, given[align] * size)) for block, align in tiles)
    if name == "_bwd_db_kernel":
        size = given["residual"].itemsize
        tile = given["BLOCK_ROW"] * given["BLOCK_COLUMN"] * size * given["STEPS"]
        return ((tile, min(16, given["ALIGN"] * size)),)
    if name in ("_fwd_kernel", "_unit_fwd_kernel"):
        tile = given["BLOCK_ROW"] * given["BLOCK_COLUMN"] * size
        return ((tile, min(16, given["TEACHER_ALIGN"] * size)),)
    return ()
