"""The kernels of attention_divergence on the named workloads; relations run the same ones."""

from collections.abc import Iterator
from typing import Any, get_args

import torch
from fastkd_kernels import AttentionDivergenceKind
from fastkd_kernels.attention_divergence import triton_path
from triton import cdiv

from benchmarks import costs
from benchmarks.attention_calls import (
    heads_of,
    mean_keys,
    mean_queries,
    pairs_of,
    score_loops,
    tile_loads,
)
from benchmarks.jobs import Call, Loop, Seen
from benchmarks.recording import Launch, meta
from benchmarks.workloads import ATTENTION, AttentionWorkload

# Gemma 2 caps scores; GPT-OSS has sinks, and a window in every other layer
CAPPED = AttentionWorkload("gemma-2-like", 0, 0, 8, (4, 4), 1024, (256, 256), causal=True)
SUNK = AttentionWorkload("gpt-oss-like", 0, 0, 64, (8, 8), 1024, (64, 64), causal=True)
WORKLOADS = (*ATTENTION.values(), CAPPED, SUNK)
# small heads with every kind, wide causal heads, which need blocks of their own, and sinks; capped
# heads of 256 hold too few rows for the newest tensor cores, so a test of their own compiles them
QUICK = ("minilm-6-to-3-128", "minilm-6-to-3-512", "llama-like-1024", SUNK.name)
WINDOW = 128
# what sets workloads apart from a plain model
FORMS = {CAPPED.name: {"capped"}, SUNK.name: {"sunk", "windowed"}}


def calls(work: AttentionWorkload, dtype: torch.dtype, count: int) -> Iterator[Call]:
    """Forward and backward of every kind, with masks."""
    pairs = pairs_of(work, dtype, count)
    form = FORMS.get(work.name, set())
    if "capped" in form:
        pairs = [pair._replace(student_softcap=50.0, teacher_softcap=50.0) for pair in pairs]
    sinks = None
    if "sunk" in form:
        one = meta(work.heads, dtype=torch.float32)
        pairs = [pair._replace(student_sinks=one, teacher_sinks=one) for pair in pairs]
        sinks = meta(count, work.heads, dtype=torch.float32)
    window = WINDOW if "windowed" in form else 0
    mask = meta(work.batch, work.tokens, dtype=torch.bool)

    weights = meta(work.batch, dtype=torch.float32)

    def run(kind: str) -> None:
        plan = triton_path.forward(pairs, True, kind, work.causal, window, True)
        plan(heads_of(pairs), (sinks, sinks), (mask, mask), weights)

    for kind in get_args(AttentionDivergenceKind):
        yield Call(kind, lambda kind=kind: run(kind))


def seen(launch: Launch, work: AttentionWorkload, dtype: torch.dtype, count: int) -> Seen:
    """Both sides' heads are read; programs of keys take the query heads of a key head."""
    given = launch.arguments
    part = launch.kernel_name.removeprefix("_").removesuffix("_kernel")
    if part == "short":
        steps = given["program_heads"] * cdiv(given["tokens"], given["BLOCK_QUERY"])
        loops: tuple[Loop, ...] = (Loop(steps),)
        rows = given["BLOCK_QUERY"] + given["BLOCK_KEY"]
    elif part in ("rows_dq", "dk_value"):
        loops, rows = sweep_loops(part, given)
    elif part == "dk":
        turns = given["heads"] // given["kv_heads"]
        loops = (Loop(turns, (Loop(mean_queries(given), score_loops(given)),)),)
        rows = given["BLOCK_QUERY"]
    else:
        sweeps = 2 if given.get("WRITE_VALUES") else 1
        loops = (Loop(mean_keys(given), score_loops(given)),) * sweeps
        rows = given["BLOCK_KEY"]
    return Seen(
        part,
        loops,
        count * costs.attention_inputs(work, dtype),
        even=not work.causal,
        loads=tile_loads(given, rows),
    )


def sweep_loops(part: str, given: dict[str, Any]) -> tuple[tuple[Loop, ...], int]:
    """Loops of the kernels in two sweeps, and the rows that a step reads, of valid rows alone.

    Those that every row sees have a loop of their own, and the others, on the diagonal and in
    windows, one that compares.
    """
    rows, keys = given["BLOCK_QUERY"], given["BLOCK_KEY"]
    of_rows = part == "rows_dq"
    every = mean_keys(given) if of_rows else mean_queries(given)
    held, step = (rows, keys) if of_rows else (keys, rows)
    tokens = given["tokens"]
    starts = range(0, tokens, held)
    if given["WINDOWED"]:
        whole = [0] * len(starts)
    elif given["CAUSAL"]:
        # of rows, keys up to the first one of the block; of keys, rows from the last one
        reach = [first + 1 if of_rows else tokens - first - held + 1 for first in starts]
        whole = [max(0, reached) // step for reached in reach]
    else:
        whole = [tokens // step] * len(starts)
    seen_whole = sum(whole) / len(whole)
    # the first block alone gives maxima
    first_block = 1.0 / max(1.0, seen_whole) if of_rows else 1.0
    loops: tuple[Loop, ...] = (Loop(seen_whole, branched=first_block), Loop(every - seen_whole))
    if of_rows and given["KIND"] == "js":
        loops += (Loop(seen_whole), Loop(every - seen_whole))
    if not of_rows and given["repeat"] > 1:
        loops = (Loop(given["repeat"], loops),)
    return loops, step
