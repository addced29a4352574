"""The registered ops under `torch.library.opcheck`, `torch.compile` and deterministic mode."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastkd_kernels import AttentionState, attention_score_mse
from fastkd_kernels import attention_score_mse as attention_function
from fastkd_kernels.unit_gradient import inverse
from kernel_cases import attention_states, errors, leaves_of, masks
from torch import Tensor

BACKENDS = ["torch", "triton"] if not torch.cuda.is_available() else ["torch"]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _attention_arguments() -> tuple[Any, ...]:
    student, teacher = attention_states(2, 2, 4, 6, (3, 5), kv_heads=(2, 4), dtype=torch.float32)
    lists = [[s.query for s in student], [s.key for s in student]]
    lists += [[t.query for t in teacher], [t.key for t in teacher]]
    mask = masks(2, 6)
    count = inverse(mask.sum(), torch.float32, mask.device)
    return (*lists, [0.5, 0.6], [0.7, 0.8], mask, None, count)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need_grad", [True, False])
def test_opcheck(backend: str, need_grad: bool) -> None:
    ops = torch.ops.fastkd_kernels
    arguments = _attention_arguments()
    if not need_grad:
        frozen = [[tensor.detach() for tensor in tensors] for tensors in arguments[:2]]
        arguments = (*frozen, *arguments[2:])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if backend == "torch":
        tests += ("test_aot_dispatch_static",)
    gram = (*arguments, need_grad, backend)
    torch.library.opcheck(ops.attention_score_mse_gram.default, gram, test_utils=tests)
    one_pass = (*arguments, True, "tiles", need_grad, backend)
    torch.library.opcheck(ops.attention_score_mse_one_pass.default, one_pass, test_utils=tests)


def test_opcheck_of_the_backward() -> None:
    ops = torch.ops.fastkd_kernels
    arguments = _attention_arguments()
    detached = [[tensor.detach() for tensor in tensors] for tensors in arguments[:4]]
    _, to_query, to_key = ops.attention_score_mse_gram(*detached, *arguments[4:], True, "torch")
    backward = (torch.ones(2), to_query, to_key, *detached, *arguments[4:8], "torch")
    torch.library.opcheck(ops.attention_score_mse_gram_backward.default, backward)


def _losses(
    query: Tensor,
    key: Tensor,
    states: list[AttentionState],
    mask: Tensor,
    algorithm: Any,
) -> Tensor:
    own = [AttentionState(query * 2, key, None, 0.5)]
    options: dict[str, Any] = {"key_mask": mask, "query_mask": mask, "algorithm": algorithm}
    return 3 * attention_score_mse(own, states, **options).sum()


@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
def test_compiles_as_one_graph(algorithm: str) -> None:
    student, teacher = attention_states(1, 2, 4, 10, (3, 5), dtype=torch.float32)
    leaves = leaves_of(student)
    results = []
    compiled = torch.compile(_losses, fullgraph=True, backend="aot_eager")
    for function in (_losses, compiled):
        loss = function(*student[0][:2], teacher, masks(2, 10), algorithm)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert max(errors(results[1], results[0])) < 1e-6


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
    import fastkd_kernels

    assert fastkd_kernels.__all__ == [
        "AttentionState",
        "LogitsHead",
        "attention_divergence",
        "attention_score_mse",
        "hidden_mse",
        "logits_divergence",
        "relation_divergence",
    ]
    assert attention_function is fastkd_kernels.attention_score_mse
