"""The kernels of attention_score_mse on the named workloads."""

from collections.abc import Iterator
from typing import Any

import torch
from fastkd_kernels.attention_score_mse import triton_path
from fastkd_kernels.attention_score_mse.op import choose_algorithm
from triton import cdiv

from benchmarks import costs
from benchmarks.attention_calls import heads_of, pairs_of, score_loops, tile_loads
from benchmarks.jobs import Call, Loop, Seen
from benchmarks.recording import Launch, meta, size_of
from benchmarks.workloads import ATTENTION, AttentionWorkload

WORKLOADS = tuple(ATTENTION.values())
# short, swept, long and causal: every kernel, both forms of the Gram algebra
QUICK = (
    *(f"bert-base-to-tinybert-4-{tokens}" for tokens in (128, 512, 2048)),
    "llama-like-8192",
)


def calls(work: AttentionWorkload, dtype: torch.dtype, count: int) -> Iterator[Call]:
    """Loss and gradients by the algorithm that "auto" chooses, with masks."""
    pairs = pairs_of(work, dtype, count)
    mask = meta(work.batch, work.tokens, dtype=torch.bool)
    chosen = choose_algorithm(work.tokens, *work.dims, causal=work.causal, backend="triton")

    def run() -> None:
        given = (heads_of(pairs), (mask, mask))
        if chosen == "gram" and not work.causal:
            squares, *factors = triton_path.gram_forward(pairs, True, True)(*given)
            triton_path.gram_backward(pairs, True)(squares, *factors, *given)
        else:
            factor = meta(dtype=torch.float32)
            triton_path.one_pass(pairs, True, work.causal, chosen, True)(*given, factor)

    yield Call("", run)


def seen(launch: Launch, work: AttentionWorkload, dtype: torch.dtype, count: int) -> Seen:
    given = launch.arguments
    return KERNELS[launch.kernel_name](launch, given, count * costs.attention_inputs(work, dtype))


def _by_key(launch: Launch, given: dict[str, Any], read: int) -> Seen:
    """A block of keys against the query rows of its chunk, for each head of its key head."""
    tokens, keys, step = given["tokens"], given["BLOCK_KEY"], given["BLOCK_QUERY"]
    chunk = given["chunk_tokens"]
    met = []
    for key in range(0, tokens, keys):
        first = key // step * step if given["CAUSAL"] else 0
        last = min(tokens, (key // chunk + 1) * chunk) if given["CAUSAL"] else tokens
        met.append(cdiv(last - first, step))
    inner = Loop(sum(met) / len(met), score_loops(given))
    loops = (Loop(given["heads"] // given["kv_heads"], (inner,)),)
    return Seen("by_key", loops, read, even=not given["CAUSAL"], loads=tile_loads(given, step))


def _short(launch: Launch, given: dict[str, Any], read: int) -> Seen:
    """Whole sequences of several heads, one after the other."""
    loops = (Loop(given["program_heads"] * cdiv(given["tokens"], given["BLOCK_QUERY"])),)
    rows = given["BLOCK_QUERY"] + given["BLOCK_KEY"]
    return Seen("short", loops, read, loads=tile_loads(given, rows))


def _sweep(launch: Launch, given: dict[str, Any], read: int) -> Seen:
    """Passes over the query rows of every head, each with its own keys; one pass is no loop."""
    tokens, rows, passes = given["tokens"], given["BLOCK_QUERY"], given["PASSES"]
    blocks = cdiv(tokens, rows)
    held = given["KEY_BLOCKS"] * given["BLOCK_KEY"]
    firsts = [turn * held // rows if given["CAUSAL"] else 0 for turn in range(passes)]
    loop = Loop(blocks - sum(firsts) / passes)
    loop = Loop(given["heads"] // given["kv_heads"], (loop,))
    loops = (Loop(passes, (loop,)),) if passes > 1 else (loop,)
    return Seen("sweep", loops, read, loads=tile_loads(given, rows))


def _by_query(launch: Launch, given: dict[str, Any], read: int) -> Seen:
    tokens, rows, step = given["tokens"], given["BLOCK_QUERY"], given["BLOCK_KEY"]
    chunk = given["chunk_tokens"]
    met = []
    for row in range(0, tokens, rows):
        first = row // chunk * chunk if given["CAUSAL"] else 0
        met.append(cdiv((min(tokens, row + rows) if given["CAUSAL"] else tokens) - first, step))
    loops = (Loop(sum(met) / len(met), score_loops(given)),)
    return Seen("by_query", loops, read, even=not given["CAUSAL"], loads=tile_loads(given, step))


def _grams(launch: Launch, given: dict[str, Any], read: int) -> Seen:
    """Programs of the mirrored block end at once, and are left out."""
    own, target = (cdiv(given[name], given["BLOCK_COLUMN"]) for name in ("dim", "teacher_dim"))
    steps = Loop(cdiv(min(given["chunk_tokens"], given["tokens"]), given["BLOCK_ROW"]))
    tiles = own + target
    side = ("queries", "keys")[given["SIDE"]]
    return Seen(
        f"gram of {side}",
        (Loop(given["heads"] // given["groups"], (steps,)),) if side == "queries" else (steps,),
        read // 2,
        programs=launch.programs * (tiles * tiles - own * target) // tiles**2,
        loads=_part_loads(given),
    )


def _apply(launch: Launch, given: dict[str, Any], read: int) -> Seen:
    tiles = sum(cdiv(given[name], given["BLOCK_COLUMN"]) for name in ("dim", "teacher_dim"))
    side = ("queries", "keys")[given["SIDE"]]
    loops = (Loop(tiles),)
    if side == "keys":
        loops = (Loop(given["groups"] // given["kv_heads"], loops),)
    return Seen(f"apply to {side}", loops, read // 2)


def _scan(launch: Launch, given: dict[str, Any], read: int) -> Seen:
    """Grams are read and written."""
    name = "scan of queries" if given["REVERSE"] else "scan of keys"
    return Seen(name, (Loop(given["chunks"]),), size_of(given["grams"]))


def _part_loads(given: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """Of a tile of student's and of teacher's columns, read alike."""
    column = given["BLOCK_COLUMN"]
    return tile_loads(
        given | {"BLOCK_DIM": column, "BLOCK_TEACHER_DIM": column}, given["BLOCK_ROW"]
    )


KERNELS = {
    "_short_kernel": _short,
    "_sweep_kernel": _sweep,
    "_tiles_fwd_kernel": _by_key,
    "_tiles_bwd_dq_kernel": _by_query,
    "_gram_kernel": _grams,
    "_gram_bwd_kernel": _apply,
    "_scan_kernel": _scan,
}
