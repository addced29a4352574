"""The registered op of indexer_divergence, its errors and its launch parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import IndexerState, indexer_divergence
from fastkd_kernels.common.autograd import inverse
from indexer_cases import IndexerCase, indexer_case
from kernel_cases import masks
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
    torch.library.opcheck(torch.ops.fastkd_kernels.indexer_divergence.default, arguments)


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
    (teacher(scale=0.0), ValueError, r"teacher\[0\].scale is 0.0; expected a finite factor"),
    (teacher(softcap=-1.0), ValueError, r"softcap is -1.0; expected a finite number above 0"),
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
