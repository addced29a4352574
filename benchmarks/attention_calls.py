"""Calls on attention heads without memory, and how often the loops of attention kernels turn."""

from collections.abc import Sequence
from typing import Any

import torch
from fastkd_kernels.common.head_groups import Pair
from torch import Tensor
from triton import cdiv

from benchmarks.jobs import Loop
from benchmarks.recording import meta
from benchmarks.workloads import AttentionWorkload


def pairs_of(work: AttentionWorkload, dtype: torch.dtype, count: int) -> list[Pair]:
    """Layer pairs of a workload, contiguous."""
    tensors = [
        meta(work.batch, heads, work.tokens, dim, dtype=dtype)
        for kv_heads, dim in zip(work.kv_heads, work.dims, strict=True)
        for heads in (work.heads, kv_heads)
    ]
    scales = tuple(float(dim**-0.5) for dim in work.dims)
    return [Pair(tensors[0], tensors[1], tensors[2], tensors[3], *scales)] * count


def heads_of(pairs: Sequence[Pair]) -> tuple[tuple[Tensor, ...], ...]:
    """Queries, keys, the teacher's queries and keys, each over pairs, as plans take them."""
    return tuple(zip(*[pair.tensors for pair in pairs], strict=True))


def mean_keys(given: dict[str, Any]) -> float:
    """Key blocks that a block of query rows meets, mean over programs: as `keys_seen` counts."""
    tokens, rows, step = given["tokens"], given["BLOCK_QUERY"], given["BLOCK_KEY"]
    window = given["window"] if given["WINDOWED"] else tokens
    met = []
    for first in range(0, tokens, rows):
        start = max(0, first - window + 1) // step * step
        stop = min(tokens, first + rows - 1 + window)
        met.append(cdiv((min(stop, first + rows) if given["CAUSAL"] else stop) - start, step))
    return sum(met) / len(met)


def mean_queries(given: dict[str, Any]) -> float:
    """Blocks of query rows that meet a block of keys, as `queries_seeing` counts."""
    tokens, keys, step = given["tokens"], given["BLOCK_KEY"], given["BLOCK_QUERY"]
    window = given["window"] if given["WINDOWED"] else tokens
    met = []
    for first in range(0, tokens, keys):
        start = first if given["CAUSAL"] else max(0, first - window + 1)
        met.append(cdiv(min(tokens, first + keys - 1 + window) - start // step * step, step))
    return sum(met) / len(met)


def score_loops(given: dict[str, Any]) -> tuple[Loop, ...]:
    """The loops along both heads where they are read in pieces."""
    piece = given["CHUNK"]
    dims = (given["dim"], given["teacher_dim"])
    return tuple(Loop(cdiv(dim, piece)) for dim in dims) if piece else ()


def tile_loads(given: dict[str, Any], rows: int) -> tuple[tuple[int, int], ...]:
    """Bytes of both tiles that a step of the loop reads, and those that one load may take."""
    if given.get("CHUNK"):
        return ()
    sides = (("TYPE", "BLOCK_DIM", "ALIGN"), ("TEACHER_TYPE", "BLOCK_TEACHER_DIM", "TEACHER_ALIGN"))
    found = []
    for kind, block, align in sides:
        size = given[kind].primitive_bitwidth // 8
        found.append((rows * given[block] * size, min(16, given[align] * size)))
    return tuple(found)
