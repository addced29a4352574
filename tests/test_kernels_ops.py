"""The registered ops under `torch.library.opcheck`, `torch.compile` and deterministic mode."""

from collections.abc import Iterator
from inspect import isfunction, signature
from typing import Any

import fastkd_kernels
import pytest
import torch
from fastkd_kernels import AttentionState, attention_score_mse, reference
from fastkd_kernels.common.autograd import inverse
from kernel_cases import attention_states, leaves_of, masks
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# both run everywhere: Triton in its interpreter where there is no GPU
# every two of back end, causal and algorithm
PAIRWISE = [
    ("torch", False, "tiles"),
    ("torch", True, "gram"),
    ("triton", True, "tiles"),
    ("triton", False, "gram"),
]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _attention_arguments(need_grad: bool) -> tuple[Any, ...]:
    student, teacher = attention_states(
        2, 1, 2, 6, (3, 5), kv_heads=(1, 2), dtype=torch.float32, device=DEVICE
    )
    lists = [[s.query for s in student], [s.key for s in student]]
    lists += [[t.query for t in teacher], [t.key for t in teacher]]
    if not need_grad:
        lists = [[tensor.detach() for tensor in tensors] for tensors in lists]
    mask = masks(1, 6).to(DEVICE)
    count = inverse(mask.sum(), torch.float32, mask.device)
    return (*lists, [0.5, 0.6], [0.7, 0.8], mask, None, count)


# Triton's Grams have an op of their own, but for causal ones
@pytest.mark.parametrize(("backend", "causal", "algorithm"), [*PAIRWISE, ("triton", True, "gram")])
@pytest.mark.parametrize("need_grad", [True, False])
def test_opcheck(need_grad: bool, backend: str, causal: bool, algorithm: str) -> None:
    ops = torch.ops.fastkd_kernels
    arguments = _attention_arguments(need_grad)
    if algorithm == "gram" and backend == "triton" and not causal:
        op, arguments = ops.attention_score_mse_gram, (*arguments, need_grad)
    else:
        op = ops.attention_score_mse_one_pass
        arguments = (*arguments, causal, algorithm, need_grad, backend)
    torch.library.opcheck(op.default, arguments)


def test_opcheck_of_the_backward() -> None:
    ops = torch.ops.fastkd_kernels
    arguments = _attention_arguments(need_grad=False)
    _, to_query, to_key = ops.attention_score_mse_gram(*arguments, True)
    factor = torch.ones(2, device=DEVICE)
    backward = (factor, to_query, to_key, *arguments[:8])
    torch.library.opcheck(ops.attention_score_mse_gram_backward.default, backward)


def _losses(
    query: Tensor,
    key: Tensor,
    states: list[AttentionState],
    mask: Tensor,
    options: dict[str, Any],
) -> Tensor:
    own = [AttentionState(query * 2, key, None, 0.5)]
    return 3 * attention_score_mse(own, states, key_mask=mask, query_mask=mask, **options).sum()


@pytest.mark.parametrize(("backend", "causal", "algorithm"), PAIRWISE)
def test_compiles_as_one_graph(backend: str, causal: bool, algorithm: str) -> None:
    student, teacher = attention_states(1, 1, 2, 10, (3, 5), dtype=torch.float32, device=DEVICE)
    leaves = leaves_of(student)
    options = {"algorithm": algorithm, "causal": causal, "backend": backend}
    results = []
    compiled = torch.compile(_losses, fullgraph=True, backend="aot_eager")
    for function in (_losses, compiled):
        loss = function(*student[0][:2], teacher, masks(1, 10).to(DEVICE), options)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    # the same ops on the same values
    assert all(map(torch.equal, *results))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
def test_everything_is_written_and_repeats_bit_for_bit(algorithm: Any, causal: bool) -> None:
    states = attention_states(2, 2, 4, 140, (3, 5), kv_heads=(2, 4), dtype=torch.float32)
    mask = masks(2, 140)
    runs = []
    for _ in range(2):
        options: dict[str, Any] = {"key_mask": mask, "causal": causal, "algorithm": algorithm}
        loss = attention_score_mse(*states, **options).sum()
        runs.append([loss.detach(), *torch.autograd.grad(loss, leaves_of(states[0]))])
    assert all(torch.isfinite(value).all() for value in runs[0])
    assert all(map(torch.equal, *runs))


def test_public_names() -> None:
    """Every exported name is there, in order, and every op has a definition of the same name."""
    names = fastkd_kernels.__all__
    assert names == sorted(names)
    ops = {name for name in names if isfunction(getattr(fastkd_kernels, name))}
    assert {"AttentionState", "LogitsHead"} <= set(names) - ops
    assert ops <= set(reference.__all__)
    for name in ops:
        defined, given = (signature(getattr(of, name)) for of in (reference, fastkd_kernels))
        tuning = {"backend", "algorithm"}
        assert set(given.parameters) - tuning == set(defined.parameters), name
