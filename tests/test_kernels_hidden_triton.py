"""The Triton kernels of hidden states against their definitions, as `test_kernels_triton.py`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastkd_kernels import hidden_launch, hidden_mse, reference
from kernel_cases import (
    Counted,
    errors,
    fresh_tensors_are_nan,
    hidden_case,
    loss_and_gradients,
    masks,
)
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
interpreted = pytest.mark.skipif(GPU, reason="fp64 runs in the interpreter, without a GPU")


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    with fresh_tensors_are_nan():
        yield


@interpreted
@pytest.mark.parametrize("weights", ["none", "shared", "each+bias"])
def test_equals_its_definition_in_fp64(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # a workspace of one block, so that rows come in several chunks
    monkeypatch.setattr(hidden_launch, "WORKSPACE_BYTES", 1)
    case = hidden_case(2, 2, 70, (20, 20) if weights == "none" else (7, 70), weights)
    for reduction, mask in (("valid", masks(2, 70)), ("tinybert", masks(2, 70)), ("valid", None)):
        options: dict[str, Any] = {"mask": mask, "reduction": reduction, **case.trained}
        arguments = (case.leaves, case.student, case.teacher)
        given = loss_and_gradients(hidden_mse, *arguments, **options, backend="triton")
        expected = loss_and_gradients(reference.hidden_mse, *arguments, **options)
        assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("weights", ["none", "shared+bias"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
)
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, weights: str, distance: float
) -> None:
    case = hidden_case(1, 1, 50, (32, 32), weights).near(distance).cast(dtype).on(DEVICE)
    exact = case.exact()
    given = loss_and_gradients(
        hidden_mse, case.leaves, case.student, case.teacher, **case.trained, backend="triton"
    )
    made = [
        loss_and_gradients(reference.hidden_mse, c.leaves, c.student, c.teacher, **c.trained)
        for c in (case, exact)
    ]
    floors = [8 * torch.finfo(torch.float32).eps, *[torch.finfo(dtype).eps] * len(case.leaves)]
    for own, theirs, floor in zip(
        errors(given, made[1]), errors(made[0], made[1]), floors, strict=True
    ):
        assert own <= max(2 * theirs, floor)


@interpreted
@pytest.mark.parametrize("weights", ["none", "shared+bias"])
def test_gradcheck(weights: str) -> None:
    case = hidden_case(1, 1, 3, (2, 2), weights)

    def loss(*leaves: Tensor) -> Tensor:
        made = case.with_leaves(leaves)
        return hidden_mse(made.student, made.teacher, **made.trained, backend="triton")

    assert torch.autograd.gradcheck(loss, case.leaves)


def test_padding_may_hold_anything() -> None:
    case = hidden_case(1, 2, 20, (6, 9), "shared+bias", torch.float32).on(DEVICE)
    mask = masks(2, 20).to(DEVICE)
    arguments = (hidden_mse, case.leaves, case.student, case.teacher)
    clean = loss_and_gradients(*arguments, mask=mask, **case.trained, backend="triton")
    for tensor in (*case.student, *case.teacher):
        tensor.data.masked_fill_(~mask[..., None], float("nan"))
    dirty = loss_and_gradients(*arguments, mask=mask, **case.trained, backend="triton")
    assert max(errors(dirty, clean)) < 1e-6


def test_nothing_valid_gives_zero() -> None:
    nothing = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    case = hidden_case(1, 1, 9, (4, 6), "shared+bias", torch.float32).on(DEVICE)
    arguments = (hidden_mse, case.leaves, case.student, case.teacher)
    for value in loss_and_gradients(*arguments, mask=nothing, **case.trained, backend="triton"):
        assert not value.any()


def test_launches_do_not_grow_with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd_kernels import hidden_triton

    seen: dict[str, int] = {}
    for name in ("residuals", "input_gradient", "weight_gradient"):
        kernel = getattr(hidden_triton, name)
        monkeypatch.setattr(hidden_triton, name, Counted(kernel, seen, name))
    for pairs in (1, 3):
        seen.clear()
        case = hidden_case(pairs, 1, 9, (4, 6), "shared", torch.float32).on(DEVICE)
        hidden_mse(case.student, case.teacher, **case.trained, backend="triton").sum().backward()
        assert seen == {"residuals": 1, "input_gradient": 1, "weight_gradient": 1}


@needs_gpu
def test_no_host_synchronisation() -> None:
    case = hidden_case(2, 2, 64, (16, 32), "shared", torch.float32).on("cuda")
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            hidden_mse(case.student, case.teacher, **case.trained).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
