"""The kernels of indexer_divergence on the named workloads."""

from collections.abc import Iterator
from typing import Any

import torch
from fastkd_kernels.indexer_divergence import triton_path
from fastkd_kernels.indexer_divergence.torch_path import Pair
from triton import cdiv

from benchmarks.jobs import Call, Loop, Seen
from benchmarks.recording import Launch, meta, size_of, tensor_bytes
from benchmarks.workloads import INDEXER, IndexerWorkload

# Gemma 2 caps scores
CAPPED = IndexerWorkload("indexer-capped-1024", 0, 0, 64, 8, 4, 1024, (128, 256))
WORKLOADS = (*INDEXER.values(), CAPPED)
# heads that are multiplied whole, and wide ones in chunks, plain and capped
QUICK = ("indexer-gqa-2048", "indexer-mla-2048", CAPPED.name)
# of the workspace's two maps, how often a kernel reads or writes one
MAPS = {"scores": 2, "rows": 3, "bwd_dq": 1, "bwd_dk": 1}


def calls(work: IndexerWorkload, dtype: torch.dtype, count: int) -> Iterator[Call]:
    """Forward and backward, with masks."""
    batch, tokens, (dim, teacher_dim) = work.batch, work.tokens, work.dims
    pair = Pair(
        meta(batch, work.index_heads, tokens, dim, dtype=dtype),
        meta(batch, 1, tokens, dim, dtype=dtype),
        meta(batch, tokens, work.index_heads, dtype=dtype),
        meta(batch, work.heads, tokens, teacher_dim, dtype=dtype),
        meta(batch, work.kv_heads, tokens, teacher_dim, dtype=dtype),
        float(teacher_dim**-0.5),
        50.0 if work.name == CAPPED.name else None,
        meta(work.heads, dtype=torch.float32) if work.sinks else None,
    )
    mask = meta(batch, tokens, dtype=torch.bool)
    yield Call("kl", lambda: _run([pair] * count, mask, causal=work.causal))


def _run(pairs: list[Pair], mask: torch.Tensor, *, causal: bool) -> None:
    columns = [*zip(*[(*pair.student, *pair[3:5]) for pair in pairs], strict=True)]
    sinks = [pair.teacher_sinks for pair in pairs if pair.teacher_sinks is not None]
    plan = triton_path.forward(pairs, True, causal, True)
    plan(columns, torch.stack(sinks) if sinks else None, (mask, mask))


def seen(launch: Launch, work: IndexerWorkload, dtype: torch.dtype, count: int) -> Seen:
    """Of what stands in the arguments a launch moves a part, which `read` makes of the whole."""
    given = launch.arguments
    name = launch.kernel_name.removeprefix("_").removesuffix("_kernel")
    programs = None
    loops: tuple[Loop, ...]
    if name == "head_sums":
        starts = range(0, work.tokens, given["BLOCK_QUERY"])
        loops = (Loop(_mean_keys(given, starts), _pieces(given, "teacher_dim")),)
    elif name == "scores":
        heads, index_heads = (given[word] for word in ("heads", "index_heads"))
        loops = (
            Loop(heads, _pieces(given, "teacher_dim")),
            Loop(index_heads, _pieces(given, "dim")),
        )
        # tiles that no row sees are left at once
        starts = range(0, given["rows"], given["ROWS"])
        programs = count * sum(
            _keys(given, start, given["ROWS"]) for start in _local(given, starts)
        )
    elif name == "rows":
        starts = _local(given, range(0, given["rows"], given["BLOCK_ROW"]))
        mean = sum(cdiv(_width(given, start), given["BLOCK_KEY"]) for start in starts) / len(starts)
        loops = (Loop(mean),) * 2
    elif name == "bwd_dq":
        starts = _local(given, range(0, given["rows"], given["BLOCK_QUERY"]))
        loops = (Loop(_mean_keys(given, starts), _pieces(given, "dim")),)
    else:
        turns = given["index_heads"] / given["parts"]
        inside = (Loop(turns, _pieces(given, "dim")),)
        loops = (Loop(_mean_queries(given, work), inside),)
    read = _moved(launch, name, work, dtype, count) - tensor_bytes(launch)
    even = not work.causal or name == "scores"
    return Seen(name, loops, read, even=even, programs=programs, loads=_loads(given, name))


def _local(given: dict[str, Any], starts: range) -> list[int]:
    """First rows inside their items of blocks that start at these rows of a chunk."""
    return [(given["first"] + start) % given["padded"] for start in starts]


def _keys(given: dict[str, Any], start: int, rows: int) -> int:
    """Key blocks that `rows` rows from `start` see."""
    stop = min(given["tokens"], start + rows) if given["CAUSAL"] else given["tokens"]
    return cdiv(stop, given["BLOCK_KEY"])


def _mean_keys(given: dict[str, Any], starts: range | list[int]) -> float:
    return sum(_keys(given, start, given["BLOCK_QUERY"]) for start in starts) / len(starts)


def _width(given: dict[str, Any], start: int) -> int:
    """Columns of the workspace that are read for a row: whole tiles up to it."""
    tile = triton_path.ROWS
    return (start // tile + 1) * tile if given["CAUSAL"] else given["padded"]


def _mean_queries(given: dict[str, Any], work: IndexerWorkload) -> float:
    """Blocks of a chunk's rows that meet a block of keys, mean over programs of the key's
    gradient."""
    padded, step = given["padded"], given["BLOCK_QUERY"]
    first, end = given["first"], given["first"] + given["rows"]
    met = []
    for item in range(first // padded, cdiv(end, padded)):
        begin = max(0, first - item * padded)
        stop = min(end - item * padded, work.tokens)
        for key in range(0, work.tokens, given["BLOCK_KEY"]):
            start = max(begin, key // step * step) if given["CAUSAL"] else begin
            met.append(max(0, cdiv(stop - start, step)))
    return sum(met) / len(met)


def _pieces(given: dict[str, Any], size: str) -> tuple[Loop, ...]:
    """The loop along a head where it is read in pieces."""
    return (Loop(cdiv(given[size], given["CHUNK"])),) if given["CHUNK"] else ()


def _moved(launch: Launch, name: str, work: IndexerWorkload, dtype: torch.dtype, count: int) -> int:
    """Bytes that a launch reads and writes once, tensors that hold a number a row left out."""
    given = launch.arguments
    dim, teacher_dim = work.dims
    rows = work.batch * work.tokens
    teacher_row, own_row = (work.heads + work.kv_heads) * teacher_dim, work.index_heads * dim
    if name == "head_sums":
        return count * rows * teacher_row * dtype.itemsize
    # rows of all items are numbered through, with some beyond the last token
    of_rows = given["rows"] / (work.batch * given["padded"])
    widths = [_width(given, start) for start in _local(given, range(given["rows"]))]
    maps = MAPS[name] * count * sum(widths) * given["workspace"].itemsize
    if name == "rows":
        return maps
    states = own_row + dim
    if name == "scores":
        states += teacher_row
    made = int(of_rows * size_of(given["weights"]))
    if name == "bwd_dq":
        made += int(of_rows * sum(size_of(given[word]) for word in ("to_query", "to_weights")))
    elif name == "bwd_dk":
        # read, and written with what was added
        made += 2 * size_of(given["partials"])
    return maps + int(of_rows * count * rows * states * dtype.itemsize) + made


def _loads(given: dict[str, Any], name: str) -> tuple[tuple[int, int], ...]:
    """Tiles of heads that are read whole in a step, and of the workspace."""

    def tile(rows: str, side: str) -> tuple[int, int]:
        kind, align = f"{side}TYPE", f"{side}ALIGN"
        size = given[kind].primitive_bitwidth // 8
        width = given["BLOCK_DIM" if side == "" else "BLOCK_TEACHER_DIM"]
        return given[rows] * width * size, min(16, given[align] * size)

    def of_map(rows: str) -> tuple[int, int]:
        return given[rows] * given["BLOCK_KEY"] * given["workspace"].itemsize, 16

    if name == "rows":
        return (of_map("BLOCK_ROW"),) * 4
    if given["CHUNK"]:
        return ()
    return {
        "head_sums": lambda: (tile("BLOCK_KEY", "TEACHER_"),),
        "scores": lambda: (
            tile("ROWS", "TEACHER_"),
            tile("BLOCK_KEY", "TEACHER_"),
            tile("ROWS", ""),
        ),
        "bwd_dq": lambda: (tile("BLOCK_KEY", ""), of_map("BLOCK_QUERY")),
        "bwd_dk": lambda: (tile("BLOCK_QUERY", ""), of_map("BLOCK_QUERY")),
    }[name]()
