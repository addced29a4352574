"""The Triton kernels of hidden states against their definitions, as `test_kernels_triton.py`."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within
from device_marks import no_wait
from fastkd_kernels import hidden_cosine, hidden_mse, hidden_normalized_mse, reference
from fastkd_kernels.common.launch import Launch
from fastkd_kernels.hidden import triton_path
from kernel_cases import (
    Counted,
    errors,
    hidden_case,
    loss_and_gradients,
    masks,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
interpreted = pytest.mark.skipif(GPU, reason="fp64 runs in the interpreter, without a GPU")


DEFINITIONS = {
    hidden_mse: reference.hidden_mse,
    hidden_cosine: reference.hidden_cosine,
    hidden_normalized_mse: reference.hidden_normalized_mse,
}


@interpreted
@pytest.mark.parametrize("weights", ["none", "shared", "each+bias"])
@pytest.mark.parametrize("op", DEFINITIONS)
def test_equals_its_definition_in_fp64(
    op: Callable[..., Tensor], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a workspace of one block, so that rows come in several chunks
    monkeypatch.setattr(triton_path, "WORKSPACE_BYTES", 1)
    case = hidden_case(2, 2, 70, (20, 20) if weights == "none" else (7, 70), weights)
    options: list[dict[str, Any]] = [{"mask": masks(2, 70)}, {}, {"tokens": "cls"}]
    if op is hidden_mse:
        options.append({"mask": masks(2, 70), "reduction": "tinybert"})
    arguments = (case.leaves, case.student, case.teacher)
    for given in options:
        made = loss_and_gradients(op, *arguments, **case.trained, **given, backend="triton")
        expected = loss_and_gradients(DEFINITIONS[op], *arguments, **case.trained, **given)
        assert max(errors(made, expected)) < 1e-12


@pytest.fixture
def all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of large GPUs in any precision, with blocks that small problems fill."""

    def small(width: int, *_: object) -> Launch:
        block_in, block_rest = triton_path.width_blocks(width)
        blocks: dict[str, int | str] = {"BLOCK_ROW": 32, "BLOCK_COLUMN": 16, "ROWS_SUMMED": 16}
        blocks |= {"BLOCK_IN": block_in, "BLOCK_REST": block_rest}
        exact = {"PRECISION": "ieee", "GRAD_PRECISION": "ieee"}
        return Launch(blocks | exact, num_warps=4, num_stages=1)

    monkeypatch.setattr(triton_path, "fused_launch", small)


@interpreted
@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("width", [7, 40])
@pytest.mark.parametrize("weights", ["shared", "each+bias"])
@pytest.mark.parametrize("op", DEFINITIONS)
def test_all_at_once_equals_its_definition_in_fp64(
    op: Callable[..., Tensor], weights: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = hidden_case(2, 2, 41, (width, 39), weights)
    arguments = (case.leaves, case.student, case.teacher)
    mask = masks(2, 41)
    # rows in one chunk, and in several, where padding holds anything
    for workspace, given in ((1 << 20, {}), (1, {"mask": mask})):
        monkeypatch.setattr(triton_path, "WORKSPACE_BYTES", workspace)
        expected = loss_and_gradients(DEFINITIONS[op], *arguments, **case.trained, **given)
        if given:
            for tensor in (*case.student, *case.teacher):
                tensor.data.masked_fill_(~mask[..., None], float("nan"))
        made = loss_and_gradients(op, *arguments, **case.trained, **given, backend="triton")
        assert max(errors(made, expected)) < 1e-12


@interpreted
@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("op", [hidden_mse, hidden_cosine])
def test_all_at_once_without_gradients_of_weights(op: Callable[..., Tensor]) -> None:
    case = hidden_case(1, 1, 20, (7, 12), "shared+bias")
    fixed = {name: value.detach() for name, value in case.trained.items()}
    arguments = (case.leaves[:1], case.student, case.teacher)
    made = loss_and_gradients(op, *arguments, **fixed, backend="triton")
    assert max(errors(made, loss_and_gradients(DEFINITIONS[op], *arguments, **fixed))) < 1e-12


@interpreted
@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("op", [hidden_mse, hidden_cosine])
def test_all_at_once_stays_near_plain_pytorch_in_fp32(
    op: Callable[..., Tensor], distance: float
) -> None:
    case = hidden_case(4, 1, 50, (32, 32), "shared+bias").near(distance).cast(torch.float32)
    given, plain = case.run(op, backend="triton"), case.run(DEFINITIONS[op])
    check_rounding(case.defined(DEFINITIONS[op]), given, plain=plain, inputs=op is hidden_cosine)


@interpreted
@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("value", [1e25, float("inf"), float("nan")])
@pytest.mark.parametrize("op", [hidden_normalized_mse, hidden_cosine])
def test_all_at_once_shows_norms_that_are_no_numbers(
    op: Callable[..., Tensor], value: float
) -> None:
    for side in ("student", "teacher"):
        case = hidden_case(1, 1, 20, (7, 12), "shared+bias", torch.float32)
        with torch.no_grad():
            getattr(case, side)[0][0, 3] = value
        loss, *gradients = case.run(op, backend="triton")
        assert loss.isnan().all() and all(gradient.isnan().any() for gradient in gradients)


@interpreted
@pytest.mark.usefixtures("all_at_once")
def test_all_at_once_keeps_what_near_and_missing_directions_are_worth() -> None:
    """A student next to its teacher, and opposite; rows of zeros on either side, and on both."""
    case = hidden_case(1, 1, 9, (12, 12), "shared")
    with torch.no_grad():
        case.leaves[1].copy_(torch.eye(12))
        case.student[0].copy_(case.teacher[0] * torch.linspace(1, 3, 9)[None, :, None])
        case.student[0][0, :2] += 1e-6 * torch.randn(2, 12, dtype=torch.float64)
        case.student[0][0, 2] *= -1
        case.student[0][0, 3:5] = 0
        case.teacher[0][0, 4:6] = 0
    arguments = (case.leaves, case.student, case.teacher)
    for chosen in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
        mask = torch.zeros(1, 9, dtype=torch.bool)
        mask[0, chosen] = True
        given = {**case.trained, "mask": mask}
        made = loss_and_gradients(hidden_cosine, *arguments, **given, backend="triton")
        expected = loss_and_gradients(reference.hidden_cosine, *arguments, **given)
        # gradients of rows without a direction are those of the definition's clamp
        assert errors(made, expected)[0] < 1e-9


@pytest.mark.parametrize("op", [hidden_mse, hidden_cosine])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("weights", ["none", "shared+bias"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
)
def test_low_precision_stays_near_plain_pytorch(
    op: Callable[..., Tensor], dtype: torch.dtype, weights: str, distance: float
) -> None:
    case = hidden_case(4, 1, 50, (32, 32), weights).near(distance).cast(dtype).on(DEVICE)
    given = case.run(op, backend="triton", gain=2**10)
    plain = case.run(DEFINITIONS[op], gain=2**10)
    define = case.defined(DEFINITIONS[op], gain=2**10)
    check_rounding(define, given, plain=plain, inputs=op is hidden_cosine)


@pytest.mark.parametrize("weights", ["shared", "each+bias"])
@pytest.mark.parametrize("op", DEFINITIONS)
def test_half_precision_in_chunks_of_masked_rows(
    op: Callable[..., Tensor], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the sizes of BERT where there is a GPU."""
    monkeypatch.setattr(triton_path, "WORKSPACE_BYTES", 1)
    dtype, tokens, widths = (
        (torch.bfloat16, 300, (312, 768)) if GPU else (torch.float16, 70, (32, 48))
    )
    case = hidden_case(2, 2, tokens, widths, weights).cast(dtype).on(DEVICE)
    options = {"mask": masks(2, tokens).to(DEVICE), "gain": 2**10}
    given = case.run(op, backend="triton", **options)
    plain = case.run(DEFINITIONS[op], **options)
    define = case.defined(DEFINITIONS[op], **options)
    check_rounding(define, given, plain=plain, inputs=op is hidden_cosine)


@interpreted
@pytest.mark.parametrize("weights", ["none", "shared+bias"])
@pytest.mark.parametrize("op", [hidden_mse, hidden_cosine])
def test_gradcheck(op: Callable[..., Tensor], weights: str) -> None:
    case = hidden_case(1, 1, 3, (2, 2), weights)

    def loss(*leaves: Tensor) -> Tensor:
        made = case.with_leaves(leaves)
        return op(made.student, made.teacher, **made.trained, backend="triton")

    assert torch.autograd.gradcheck(loss, case.leaves)


@pytest.mark.parametrize("op", [hidden_mse, hidden_cosine])
def test_padding_may_hold_anything(op: Callable[..., Tensor]) -> None:
    case = hidden_case(1, 2, 20, (6, 9), "shared+bias", torch.float32).on(DEVICE)
    mask = masks(2, 20).to(DEVICE)
    arguments = (op, case.leaves, case.student, case.teacher)
    clean = loss_and_gradients(*arguments, mask=mask, **case.trained, backend="triton")
    define = case.defined(DEFINITIONS[op], mask=mask)
    limits = bounds(define, clean, inputs=op is hidden_cosine)[1]
    for tensor in (*case.student, *case.teacher):
        tensor.data.masked_fill_(~mask[..., None], float("nan"))
    dirty = loss_and_gradients(*arguments, mask=mask, **case.trained, backend="triton")
    check_within(dirty, clean, limits)


@pytest.mark.parametrize("op", [hidden_mse, hidden_cosine])
def test_nothing_valid_gives_zero(op: Callable[..., Tensor]) -> None:
    nothing = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    case = hidden_case(1, 1, 9, (4, 6), "shared+bias", torch.float32).on(DEVICE)
    arguments = (op, case.leaves, case.student, case.teacher)
    for value in loss_and_gradients(*arguments, mask=nothing, **case.trained, backend="triton"):
        assert not value.any()


def test_launches_do_not_grow_with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd_kernels.hidden import triton_path

    seen: dict[str, int] = {}
    for name in ("_fwd_kernel", "_unit_fwd_kernel", "_bwd_dx_kernel", "_bwd_dw_kernel"):
        kernel = getattr(triton_path, name)
        monkeypatch.setattr(triton_path, name, Counted(kernel, seen, name))
    once = {"_fwd_kernel": 1, "_bwd_dx_kernel": 1, "_bwd_dw_kernel": 1}
    for op, launches in ((hidden_mse, once), (hidden_cosine, {**once, "_unit_fwd_kernel": 1})):
        for pairs in (1, 3):
            seen.clear()
            case = hidden_case(pairs, 1, 9, (4, 6), "shared", torch.float32).on(DEVICE)
            op(case.student, case.teacher, **case.trained, backend="triton").sum().backward()
            assert seen == launches
    seen.clear()
    case = hidden_case(3, 1, 9, (6, 6), "none", torch.float32).on(DEVICE)
    hidden_cosine(case.student, case.teacher, backend="triton").sum().backward()
    assert seen == {"_unit_fwd_kernel": 1}


def test_identical_models_have_no_loss() -> None:
    case = hidden_case(1, 1, 20, (16, 16), "none", torch.float32).on(DEVICE)
    for op in (hidden_mse, hidden_cosine):
        same = case.near(0.0)
        far, near = (made.run(op, backend="triton") for made in (case, same))
        define = same.defined(DEFINITIONS[op])
        check_rounding(define, near, scales=far, inputs=op is hidden_cosine)


@needs_gpu
def test_no_host_synchronisation() -> None:
    case = hidden_case(2, 2, 64, (16, 32), "shared", torch.float32).on("cuda")
    for waits in (nullcontext, no_wait):  # the first round compiles
        with waits():
            for op in (hidden_mse, hidden_cosine):
                op(case.student, case.teacher, **case.trained).sum().backward()


@interpreted
def test_pairs_may_differ_in_shape() -> None:
    first = hidden_case(2, 1, 5, (4, 6), "each")
    second = hidden_case(1, 1, 5, (3, 7), "each")
    sides = [
        [one[0], other[0], one[1]]
        for one, other in (
            (first.student, second.student),
            (first.teacher, second.teacher),
            (first.trained["weight"], second.trained["weight"]),
        )
    ]
    arguments: Any = ([*sides[0], *sides[2]], *sides[:2])
    given = loss_and_gradients(hidden_mse, *arguments, weight=sides[2], backend="triton")
    expected = loss_and_gradients(reference.hidden_mse, *arguments, weight=sides[2])
    assert max(errors(given, expected)) < 1e-12
