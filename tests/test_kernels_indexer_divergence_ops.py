"""The registered op of indexer_divergence, its errors and its launch parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import IndexerState, indexer_divergence
from fastkd_kernels.common import plan
from fastkd_kernels.common.autograd import inverse
from fastkd_kernels.indexer_divergence import triton_path
from fastkd_kernels.indexer_divergence.op import MAX_INDEX_DIM
from fastkd_kernels.indexer_divergence.torch_path import Pair
from indexer_cases import IndexerCase, indexer_case
from kernel_cases import Counted, errors, masks
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY_BACKEND = pytest.mark.parametrize("backend", ["torch", "triton"])


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


@EVERY_BACKEND
@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype: torch.dtype, need_grad: bool, backend: str) -> None:
    device = device_of(backend)
    case = indexer_case(2, 2, 6, (3, 5), sinks=True, dtype=dtype, device=device)
    lists: list[list[Tensor]] = [
        [s.query for s in case.student],
        [s.key[:, None].detach().requires_grad_() for s in case.student],
        [s.weights for s in case.student],
    ]
    if not need_grad:
        lists = [[tensor.detach() for tensor in tensors] for tensors in lists]
    lists += [[t.query for t in case.teacher], [t.key for t in case.teacher]]
    mask = masks(2, 6).to(device)
    sinks = torch.stack([t.sinks for t in case.teacher if t.sinks is not None]).float()
    arguments = (
        *lists, [0.7, 0.8], mask, mask, inverse(mask.sum(), torch.float32, mask.device),
        True, [3.0, 2.0], sinks, need_grad, backend,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if backend == "torch":
        tests += ("test_aot_dispatch_static",)
    op = torch.ops.fastkd_kernels.indexer_divergence
    torch.library.opcheck(op.default, arguments, test_utils=tests)


def losses(query: Tensor, key: Tensor, weights: Tensor, teacher: Any, mask: Tensor, on: Any) -> Any:
    student = [IndexerState(query * 2, key, weights)]
    return 3 * indexer_divergence(student, teacher, key_mask=mask, backend=on).sum()


@EVERY_BACKEND
def test_compiles_as_one_graph(backend: str) -> None:
    device = device_of(backend)
    case = indexer_case(1, 2, 10, (4, 6), sinks=True, dtype=torch.float32, device=device)
    results = []
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for function in (losses, compiled):
        loss = function(*case.student[0], case.teacher, masks(2, 10).to(device), backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, case.leaves)])
    # the same ops on the same values
    assert all(map(torch.equal, *results))


@EVERY_BACKEND
def test_everything_is_written_and_repeats_bit_for_bit(backend: str) -> None:
    tokens = 140 if backend == "torch" else 70
    case = indexer_case(2, 2, tokens, (3, 5), dtype=torch.float32, device=device_of(backend))
    runs = []
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for _ in range(2):
            runs.append(case.run(key_mask=masks(2, tokens).to(case.leaves[0].device)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in runs[0])
    assert all(map(torch.equal, *runs))


@EVERY_BACKEND
def test_keeps_nothing_without_gradient(backend: str) -> None:
    case = indexer_case(1, 1, 5, (4, 4), dtype=torch.float32, device=device_of(backend))
    with torch.no_grad():
        without = indexer_divergence(case.student, case.teacher, backend=backend)
    assert not without.requires_grad
    assert torch.equal(without, case.run(backend=backend)[0])


def test_chunks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end inside an item, and that hold parts of two."""
    case = indexer_case(
        1, 2, 70, (4, 4), index_heads=1, heads=(1, 1), dtype=torch.float32, device=DEVICE
    )
    whole = case.run(backend="triton")
    for blocks in (1, 3):
        # two tiles of rows an item
        monkeypatch.setattr(triton_path, "WORKSPACE_BYTES", 2 * 4 * 128 * triton_path.ROWS * blocks)
        # or the whole one's would be found
        plan._plans.clear()
        cut = case.run(backend="triton")
        # the gradient of the key is summed in parts
        assert all(map(torch.equal, (*cut[:2], cut[3]), (*whole[:2], whole[3])))
        assert errors(cut[2:3], whole[2:3])[0] < 1e-6


def test_five_launches_a_chunk_whatever_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}
    names = ["head_sums", "scores", "rows", "bwd_dq", "bwd_dk"]
    for name in names:
        kernel = getattr(triton_path, f"_{name}_kernel")
        monkeypatch.setattr(triton_path, f"_{name}_kernel", Counted(kernel, counts, name))
    for pairs in (1, 3):
        counts.clear()
        case = indexer_case(pairs, 1, 9, (4, 4), dtype=torch.float32, device=DEVICE)
        case.run(backend="triton")
        assert counts == dict.fromkeys(names, 1)
    with torch.no_grad():
        indexer_divergence(case.student, case.teacher, backend="triton")
    assert counts == {**dict.fromkeys(names[:3], 2), **dict.fromkeys(names[3:], 1)}


def test_workspace_is_bounded() -> None:
    rows = triton_path.chunk_size
    assert rows(128, 8 * 128) == 128
    # 8192 tokens of four pairs, and so many tokens that one tile of rows fills it
    for count, tokens in ((4, 8192), (1, 1 << 18)):
        size = rows(8 * tokens, count * 8 * tokens)
        assert size % triton_path.ROWS == 0
        assert triton_path.ROWS <= size <= triton_path.WORKSPACE_BYTES // (count * 8 * tokens)
    assert rows(1 << 20, 1 << 30) == triton_path.ROWS


def test_rows_that_lie_far_apart_are_copied() -> None:
    """Kernels find the rows of a head by 32-bit offsets."""
    far = torch.empty_strided((1, 1, 3, 4), (1, 1, 1 << 30, 1), device="meta")
    pairs = [Pair(far, far, torch.empty(1, 3, 1, device="meta"), far, far, 1.0)]
    made = triton_path.Call(pairs, False, True, "cuda").layout.addressed([far] * 4)
    assert [tensor.stride(2) for tensor in made.tensors] == [4, 4, 4, 4]


@pytest.mark.parametrize("on", ["cuda", "hip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [(1, 1), (128, 192), (128, 576), (MAX_INDEX_DIM, 1)])
@pytest.mark.parametrize("kernel", ["head_sums", "scores", "bwd_dq", "bwd_dk"])
def test_launch(kernel: str, dims: tuple[int, int], dtype: torch.dtype, on: str) -> None:
    made = triton_path.indexer_launch(kernel, dims, (dtype, dtype), on)
    sizes = {name: size for name, size in made.constants.items() if name.startswith("BLOCK_")}
    assert all(isinstance(s, int) and s >= 16 and s & (s - 1) == 0 for s in sizes.values())
    for name, dim in zip(("BLOCK_DIM", "BLOCK_TEACHER_DIM"), dims, strict=True):
        assert int(sizes.get(name, dim)) >= dim
    if kernel != "head_sums":
        # a chunk is cut, and its slopes are written, in tiles of ROWS
        blocks = [int(sizes[name]) for name in ("BLOCK_QUERY", "BLOCK_KEY") if name in sizes]
        assert all(triton_path.ROWS % block == 0 for block in blocks)
    held = {"head_sums": "BLOCK_QUERY", "bwd_dq": "BLOCK_QUERY", "bwd_dk": "BLOCK_KEY"}
    if dtype.itemsize == 2:
        rows = int(made.constants[held.get(kernel, "ROWS")])
        assert rows % 64 == 0, "rows of a product on Hopper's and Blackwell's tensor cores"
    assert ("GRAD_PRECISION" in made.constants) == kernel.startswith("bwd")


def states() -> IndexerCase:
    return indexer_case(1, 2, 6, (3, 5), heads=(4, 2), sinks=True, dtype=torch.float32)


def options(**given: Any) -> Callable[[], Tensor]:
    case = states()
    return lambda: indexer_divergence(case.student, case.teacher, **given)


def student(**changes: Any) -> Callable[[], Tensor]:
    case = states()
    return lambda: indexer_divergence([case.student[0]._replace(**changes)], case.teacher)


def teacher(**changes: Any) -> Callable[[], Tensor]:
    case = states()
    return lambda: indexer_divergence(case.student, [case.teacher[0]._replace(**changes)])


def other_tokens() -> Tensor:
    return indexer_divergence(states().student, indexer_case(1, 2, 7, (3, 5)).teacher)


def wide() -> Tensor:
    case = indexer_case(1, 1, 2, (300, 4), dtype=torch.float32, device=DEVICE)
    return indexer_divergence(case.student, case.teacher, backend="triton")


ERRORS: list[tuple[Callable[[], Any], Any, str]] = [
    (lambda: indexer_divergence(states().student[0], []), TypeError, "must be a list or tuple"),
    (lambda: indexer_divergence([], []), ValueError, "give at least one layer pair"),
    (
        lambda: indexer_divergence(states().student, states().teacher * 2),
        ValueError,
        "student has 1 layers and teacher has 2",
    ),
    (
        lambda: indexer_divergence(states().teacher, states().teacher),
        TypeError,
        r"student\[0\] must be an IndexerState, got AttentionState",
    ),
    (
        lambda: indexer_divergence(states().student, states().student),
        TypeError,
        r"teacher\[0\] must be an AttentionState, got IndexerState",
    ),
    (
        student(query=torch.zeros(2, 6, 3)),
        ValueError,
        r"query must be \[batch, index_heads, tokens, dim\], got shape \(2, 6, 3\)",
    ),
    (
        student(key=torch.zeros(2, 3)),
        ValueError,
        r"key must be \[batch, tokens, dim\], got shape \(2, 3\)",
    ),
    (
        student(key=torch.zeros(2, 3, 6, 3)),
        ValueError,
        r"key has shape \(2, 3, 6, 3\), which does not fit its query \(2, 3, 6, 3\); "
        r"expected \[2, 1, 6, 3\]",
    ),
    (
        student(key=torch.zeros(2, 6, 4)),
        ValueError,
        r"key has shape \(2, 6, 4\), which does not fit its query \(2, 3, 6, 3\); "
        r"expected \[2, 6, 3\]",
    ),
    (
        student(weights=torch.zeros(2, 3, 6)),
        ValueError,
        r"weights has shape \(2, 3, 6\), which does not fit .*; expected \[2, 6, 3\]",
    ),
    (student(weights=None), TypeError, r"weights must be a tensor \[batch, tokens, index_heads\]"),
    (
        student(key=torch.zeros(2, 6, 3).half()),
        TypeError,
        r"student\[0\].query is torch.float32 and its key torch.float16; cast one",
    ),
    (
        student(weights=torch.zeros(2, 6, 3, dtype=torch.int8)),
        TypeError,
        "weights is torch.int8; expected bfloat16",
    ),
    (
        student(weights=torch.zeros(2, 6, 3, device="meta")),
        ValueError,
        "weights is on meta and the student is on cpu",
    ),
    (other_tokens, ValueError, r"teacher\[0\].query has batch and tokens \(2, 7\)"),
    (teacher(scale=0.0), ValueError, r"teacher\[0\].scale is 0.0; expected a factor"),
    (teacher(softcap=1e39), ValueError, r"softcap is 1e\+39; expected a number from 1e-20"),
    (teacher(softcap=-1.0), ValueError, "softcap is -1.0; expected a number from 1e-20"),
    (teacher(sinks=torch.zeros(3)), ValueError, "sinks has 3 entries for 4 query heads"),
    (
        teacher(sinks=torch.zeros(4, requires_grad=True)),
        ValueError,
        r"teacher\[0\].sinks requires grad, but only the student is trained",
    ),
    (
        teacher(query=torch.zeros(2, 4, 6, 5, requires_grad=True)),
        ValueError,
        r"teacher\[0\].query requires grad",
    ),
    (teacher(key=torch.zeros(2, 3, 6, 5)), ValueError, "key heads must divide the query heads"),
    (options(key_mask=torch.ones(2, 6)), TypeError, "key_mask is torch.float32; .*bool"),
    (options(query_mask=torch.ones(6, 2).bool()), ValueError, r"\(6, 2\); expected .*\(2, 6\)"),
    (options(backend="cuda"), ValueError, "backend='cuda' is not known"),
    (wide, ValueError, "are 300 wide, .* up to 256; use backend='torch'"),
]


@pytest.mark.parametrize(("run", "kind", "message"), ERRORS)
def test_errors(run: Callable[[], Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        run()
