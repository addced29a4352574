"""The registered ops of attention_divergence, its errors and its launch parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from divergence_cases import KINDS
from fastkd_kernels import AttentionState, attention_divergence, relation_divergence
from fastkd_kernels.attention_divergence.op import MAX_HEAD_DIM
from fastkd_kernels.attention_divergence.triton_path import divergence_launch
from fastkd_kernels.common.autograd import inverse
from fastkd_kernels.common.counted_rows import counted_rows
from kernel_cases import attention_states, leaves_of, masks
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"] if not torch.cuda.is_available() else ["torch"]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def arguments(kind: str, need_grad: bool) -> tuple[Any, ...]:
    student, teacher = attention_states(2, 2, 2, 6, (3, 5), kv_heads=(1, 2), dtype=torch.float32)
    lists = [[s.query for s in student], [s.key for s in student]]
    if not need_grad:
        lists = [[tensor.detach() for tensor in tensors] for tensors in lists]
    lists += [[t.query for t in teacher], [t.key for t in teacher]]
    mask = masks(2, 6)
    weights = inverse(mask.sum(), torch.float32, mask.device).expand(2)
    plain = (None,) * 4
    return (*lists, [0.5, 0.6], [0.7, 0.8], mask, mask, weights, kind, True, 3, *plain, need_grad)


@EVERY_BACKEND
@pytest.mark.parametrize(("kind", "need_grad"), [("kl", True), ("js", True), ("kl", False)])
def test_opcheck(kind: str, need_grad: bool, backend: str) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if backend == "torch":
        tests += ("test_aot_dispatch_static",)
    op = torch.ops.fastkd_kernels.attention_divergence
    torch.library.opcheck(op.default, (*arguments(kind, need_grad), backend), test_utils=tests)


def losses(query: Tensor, key: Tensor, value: Tensor, states: Any, mask: Tensor, on: Any) -> Tensor:
    own = [AttentionState(query * 2, key, value, 0.5)]
    options: dict[str, Any] = {"key_mask": mask, "query_mask": mask, "backend": on}
    first = attention_divergence(own, states, kind="js", window=4, **options)
    return 3 * first.sum() + relation_divergence(own, states, relation_heads=2, **options).sum()


@EVERY_BACKEND
def test_compiles_as_one_graph(backend: str) -> None:
    student, teacher = attention_states(1, 2, 2, 10, (4, 6), dtype=torch.float32)
    teacher = [t._replace(value=t.key) for t in teacher]
    value = torch.randn(2, 2, 10, 4, requires_grad=True)
    leaves = [*leaves_of(student), value]
    results = []
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for function in (losses, compiled):
        loss = function(*leaves, teacher, masks(2, 10), backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    # the same ops on the same values
    assert all(map(torch.equal, *results))


@EVERY_BACKEND
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_written_and_repeats_bit_for_bit(kind: Any, backend: Any) -> None:
    tokens = 140 if backend == "torch" else 40
    states = attention_states(2, 1, 2, tokens, (3, 5), kv_heads=(1, 2), dtype=torch.float32)
    mask = masks(1, tokens)
    runs = []
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for _ in range(2):
            loss = attention_divergence(*states, kind=kind, key_mask=mask, backend=backend).sum()
            runs.append([loss.detach(), *torch.autograd.grad(loss, leaves_of(states[0]))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in runs[0])
    assert all(map(torch.equal, *runs))


def test_keeps_nothing_without_gradient() -> None:
    states = attention_states(1, 1, 2, 5, (4, 4))
    with torch.no_grad():
        assert not attention_divergence(*states).requires_grad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_counted_rows(causal: bool, window: int) -> None:
    mask = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 1, 0], [0] * 9, [1] * 9]).bool()
    ahead = torch.arange(9)[None, :] - torch.arange(9)[:, None]
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window:
        seen = seen & (ahead.abs() < window)
    expected = (seen & mask[:, None, :]).any(-1)
    given = counted_rows(mask, None, causal, window)
    assert given is not None
    assert torch.equal(given, expected)
    given = counted_rows(mask, ~mask, causal, window)
    assert given is not None
    assert torch.equal(given, expected & ~mask)
    assert counted_rows(None, mask, causal, window) is mask
    assert counted_rows(None, None, causal, window) is None


def states() -> tuple[list[AttentionState], list[AttentionState]]:
    return attention_states(1, 2, 4, 6, (3, 5), dtype=torch.float32)


def options(**given: Any) -> Callable[[], Tensor]:
    return lambda: attention_divergence(*states(), **given)


def wide() -> Tensor:
    states = attention_states(1, 1, 1, 2, (300, 4), dtype=torch.float32, device=DEVICE)
    return attention_divergence(*states, backend="triton")


ERRORS: list[tuple[Callable[[], Any], Any, str]] = [
    (lambda: attention_divergence(states()[0][0], states()[1]), TypeError, "must be a list"),
    (lambda: attention_divergence([], []), ValueError, "give at least one layer pair"),
    (lambda: attention_divergence(states()[0], states()[1] * 2), ValueError, "teacher has 2"),
    (
        lambda: attention_divergence(
            states()[0], attention_states(1, 2, 6, 6, (3, 5), dtype=torch.float32)[1]
        ),
        ValueError,
        "student has 4 heads and the teacher has 6; .*relation_divergence",
    ),
    (options(kind="hellinger"), ValueError, "kind='hellinger' is not known; choose one of kl, rev"),
    (options(temperature=0.0), ValueError, "temperature is 0.0; expected 0.001 to 1000"),
    (options(temperature=float("inf")), ValueError, "temperature is inf"),
    (options(temperature="1"), TypeError, "temperature must be a float, got str"),
    (options(window=0), ValueError, "window is 0; expected 1 or more, or None"),
    (options(window=2.5), TypeError, "window must be a number of tokens or None, got float"),
    (options(key_mask=torch.ones(2, 6)), TypeError, "key_mask is torch.float32; .*bool"),
    (options(query_mask=torch.ones(6, 2).bool()), ValueError, r"\(6, 2\); expected .*\(2, 6\)"),
    (options(backend="cuda"), ValueError, "backend='cuda' is not known"),
    (wide, ValueError, "head size 300 is too wide .* up to 256; use backend='torch'"),
]


@pytest.mark.parametrize(("run", "kind", "message"), ERRORS)
def test_errors(run: Callable[[], Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        run()


@pytest.mark.parametrize("on", ["cuda", "hip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [(1, 1), (26, 64), (128, 128), (MAX_HEAD_DIM, 1)])
@pytest.mark.parametrize("part", ["rows", "dq", "dk"])
def test_launch(part: str, dims: tuple[int, int], dtype: torch.dtype, on: str) -> None:
    made, other = (divergence_launch(part, kind, dims, (dtype, dtype), on) for kind in ("kl", "js"))
    assert made.constants == other.constants
    sizes = {name: size for name, size in made.constants.items() if name.startswith("BLOCK_")}
    assert all(isinstance(s, int) and s >= 16 and s & (s - 1) == 0 for s in sizes.values())
    assert sizes["BLOCK_DIM"] >= dims[0]
    assert sizes["BLOCK_TEACHER_DIM"] >= dims[1]
    held = sizes["BLOCK_KEY" if part == "dk" else "BLOCK_QUERY"]
    if dtype.itemsize == 2 and max(dims) <= 128:
        assert held in (64, 128), "rows of a product on Hopper's and Blackwell's tensor cores"
    assert ("GRAD_PRECISION" in made.constants) == (part != "rows")
