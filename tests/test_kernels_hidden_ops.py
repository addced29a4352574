"""The registered op of hidden states: opcheck, `torch.compile`, deterministic mode, messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import hidden_cosine, hidden_mse, hidden_normalized_mse
from fastkd_kernels.common import launch
from fastkd_kernels.common.autograd import inverse
from fastkd_kernels.hidden import triton_path
from kernel_cases import fresh_tensors_are_nan, hidden_case, masks
from torch import Tensor

BACKENDS = ["torch", "triton"] if not torch.cuda.is_available() else ["torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
def test_opcheck(tokens: int, normalize: bool, backend: str) -> None:
    """With 2 tokens the CPU keeps row gradients, with 12 their products."""
    ops = torch.ops.fastkd_kernels
    case = hidden_case(2, 2, tokens, (3, 5), "shared+bias", torch.float32)
    mask = masks(2, tokens)
    student, weight, bias = case.student, *case.leaves[2:]
    student, (weight, bias) = [t.detach() for t in student], (weight.detach(), bias.detach())
    count = inverse(mask.sum(), torch.float32, mask.device)
    for need_grad in (True, False):
        flags = (normalize, need_grad, need_grad, backend)
        arguments = (student, case.teacher, [weight], [bias], mask, count, *flags)
        torch.library.opcheck(ops.hidden_rows.default, arguments)
        *_, row_grad = ops.hidden_rows(*arguments)
        assert bool(row_grad.numel()) == (need_grad and backend == "torch" and tokens == 1)
        if row_grad.numel():
            backward = (row_grad, student, [weight], 1, mask, torch.ones(2), True)
            torch.library.opcheck(ops.hidden_rows_backward.default, backward)


def _losses(hidden: Tensor, target: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    arguments: Any = ([hidden * 2], [target])
    options: Any = {"weight": weight, "mask": mask}
    first = hidden_cosine(*arguments, **options, tokens="cls")
    return 3 * hidden_mse(*arguments, **options).sum() + first.sum()


def test_compiles_as_one_graph() -> None:
    """The loss of all tokens keeps products, that of the first tokens row gradients."""
    case = hidden_case(1, 3, 10, (4, 6), "shared", torch.float32)
    results = []
    compiled = torch.compile(_losses, fullgraph=True, backend="aot_eager")
    for function in (_losses, compiled):
        loss = function(case.student[0], case.teacher[0], case.leaves[1], masks(3, 10))
        results.append([loss.detach(), *torch.autograd.grad(loss, case.leaves)])
    # the same ops on the same values
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("width", [1, 16, 384, 768, 4096, 16384])
def test_rows_of_one_program(width: int) -> None:
    """Whole rows, in blocks that divide the chunks, few enough values for the registers."""
    made = triton_path.unit_launch(width)
    rows, columns = (int(made.constants[name]) for name in ("BLOCK_ROW", "BLOCK_COLUMN"))
    assert columns >= width
    assert 64 % rows == 0
    assert rows * columns <= max(4096, 2 * width)
    assert rows * columns // (32 * made.num_warps) <= 32


@pytest.mark.parametrize("width", [1, 16, 31, 40, 312, 320, 384, 500])
def test_blocks_of_a_students_row(width: int) -> None:
    """Powers of two that `tl.dot` takes, no more columns than one block would have."""
    blocks = [block for block in triton_path.width_blocks(width) if block]
    assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
    assert width <= sum(blocks) < 2 * max(width, 16)
    assert width - blocks[0] <= sum(blocks[1:])


def test_all_at_once_in_half_precision_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    for arch in (80, 90, 100, "gfx942"):
        monkeypatch.setattr(launch, "architecture", lambda arch=arch: arch)
        taken = {
            (width, dtypes)
            for width in (64, 312, 384)
            for dtypes in ((bf16, bf16, bf16), (half, half, fp32), (fp32, fp32, fp32))
            if triton_path.fused_launch(width, dtypes)
        }
        assert taken == ({(64, (bf16,) * 3), (312, (bf16,) * 3)} if arch == 90 else set())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("op", [hidden_mse, hidden_cosine])
def test_pytorch_path_stays_on_the_device(op: Callable[..., Tensor], tokens: int) -> None:
    case = hidden_case(2, 2, tokens, (5, 6), "shared+bias", torch.float32).on("meta")
    loss = op(case.student, case.teacher, **case.trained, backend="torch")
    gradients = torch.autograd.grad(loss.sum(), case.leaves)
    for gradient, leaf in zip(gradients, case.leaves, strict=True):
        assert (gradient.device, gradient.shape) == (leaf.device, leaf.shape)


@pytest.mark.parametrize("tokens", [2, 40])
def test_autocast_and_inference_mode_change_nothing(tokens: int) -> None:
    """Autocast would make products in bf16; tensors of inference mode can't be saved."""
    case = hidden_case(2, 2, tokens, (5, 6), "shared+bias", torch.float32)
    with torch.inference_mode():
        teacher = [tensor * 1 for tensor in case.teacher]
    runs = []
    for enabled, targets in ((False, case.teacher), (True, teacher)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = hidden_mse(case.student, targets, mask=masks(2, tokens), **case.trained).sum()
            runs.append([loss.detach(), *torch.autograd.grad(loss, case.leaves)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("op", [hidden_mse, hidden_cosine])
@pytest.mark.parametrize("tokens", [2, 140])
def test_everything_is_written_and_repeats_bit_for_bit(
    tokens: int, op: Callable[..., Tensor]
) -> None:
    case = hidden_case(2, 2, tokens, (5, 6), "each+bias", torch.float32)
    runs = []
    with fresh_tensors_are_nan():
        for _ in range(2):
            loss = op(case.student, case.teacher, mask=masks(2, tokens), **case.trained).sum()
            runs.append([loss.detach(), *torch.autograd.grad(loss, case.leaves)])
    assert all(torch.isfinite(value).all() for value in runs[0])
    assert all(map(torch.equal, *runs))


MESSAGES = [
    (lambda c: hidden_mse(c.student[0], c.teacher), TypeError, "student must be a list"),
    (lambda c: hidden_mse(c.student, c.teacher * 2), ValueError, "1 layers and teacher has 2"),
    (
        lambda c: hidden_mse(c.student, c.teacher),
        ValueError,
        r"3 wide .* a weight \[5, 3\]",
    ),
    (lambda c: hidden_mse(c.student, c.teacher, bias=torch.ones(5)), ValueError, "without weight"),
    (lambda c: hidden_mse(c.student, c.teacher, weight=3), TypeError, "weight must be a tensor, a"),
    (
        lambda c: hidden_mse(c.student, c.teacher, weight=[torch.ones(5, 3)] * 2),
        ValueError,
        "weight has 2 tensors for 1 pairs",
    ),
    (
        lambda c: hidden_mse(c.student, c.teacher, weight=torch.ones(3, 5)),
        ValueError,
        r"weight has shape \(3, 5\); expected .*\[5, 3\]",
    ),
    (
        lambda c: hidden_mse(c.student * 2, c.teacher * 2, weight=_two_dtypes()),
        TypeError,
        r"weight\[1\] is torch.float16 and weight\[0\] is torch.float32",
    ),
    (
        lambda c: hidden_mse(c.student, c.teacher, **c.trained, bias=torch.ones(3)),
        ValueError,
        r"bias has shape \(3,\)",
    ),
    (
        lambda c: hidden_mse(c.student, [t[:, :2] for t in c.teacher], **c.trained),
        ValueError,
        r"batch and tokens \(2, 2\)",
    ),
    (
        lambda c: hidden_mse(c.student, [t.requires_grad_() for t in c.teacher], **c.trained),
        ValueError,
        "teacher.0. requires grad",
    ),
    (
        lambda c: hidden_mse(c.student, c.teacher, mask=torch.ones(2, 6).long(), **c.trained),
        TypeError,
        "mask is torch.int64",
    ),
    (
        lambda c: hidden_cosine(c.student, c.teacher, tokens="first", **c.trained),
        ValueError,
        "tokens='first' is not known; choose one of all, cls",
    ),
    (
        lambda c: hidden_normalized_mse(c.student, c.teacher, mask=torch.ones(2, 6), **c.trained),
        TypeError,
        "mask is torch.float32",
    ),
    (
        lambda c: hidden_cosine(c.student, c.teacher),
        ValueError,
        r"3 wide .* a weight \[5, 3\]",
    ),
    (
        lambda c: hidden_cosine(c.student, c.teacher, backend="cuda", **c.trained),
        ValueError,
        "backend='cuda' is not known",
    ),
    (
        lambda c: hidden_mse(c.student, c.teacher, reduction="sum", **c.trained),
        ValueError,
        "reduction='sum' is not known",
    ),
]


def _two_dtypes() -> list[torch.Tensor]:
    return [torch.ones(5, 3), torch.ones(5, 3, dtype=torch.float16)]


@pytest.mark.parametrize(("call", "kind", "message"), MESSAGES)
def test_messages(call: Callable[[Any], Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        call(hidden_case(1, 2, 6, (3, 5), "shared", torch.float32))
