"""hidden_mse against its definition: values, gradients, padding, memory."""

from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within
from fastkd_kernels import hidden_mse, reference
from kernel_cases import errors, hidden_case, loss_and_gradients, masks, peak_bytes
from torch import Tensor

WEIGHTS = ["none", "shared", "each", "shared+bias", "each+bias"]


def both(case: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradients of the op and of its definition on fp64 copies."""
    exact = case.exact()
    defined = {name: value for name, value in options.items() if name != "backend"}
    given = loss_and_gradients(
        hidden_mse, case.leaves, case.student, case.teacher, **case.trained, **options
    )
    expected = loss_and_gradients(
        reference.hidden_mse, exact.leaves, exact.student, exact.teacher, **exact.trained, **defined
    )
    return given, expected


@pytest.mark.parametrize("reduction", ["valid", "tinybert"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("tokens", [1, 37, 130])
def test_equals_its_definition_in_fp64(
    tokens: int, pairs: int, weights: str, reduction: str
) -> None:
    widths = (12, 12) if weights == "none" else (7, 12)
    case = hidden_case(pairs, 3, tokens, widths, weights)
    for mask in (None, masks(3, tokens), torch.zeros(3, tokens, dtype=torch.bool)):
        given, expected = both(case, mask=mask, reduction=reduction)
        assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize("tokens", [128, 700])
def test_equals_its_definition_in_fp32_at_bert_sizes(tokens: int) -> None:
    case = hidden_case(1, 4, tokens, (312, 768), "shared+bias", torch.float32)
    given, _ = both(case, mask=masks(4, tokens))
    check_rounding(case.defined(reference.hidden_mse, mask=masks(4, tokens)), given)


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("weights", ["none", "shared+bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, weights: str, distance: float
) -> None:
    # several pairs: the error of a single loss may be 0 by chance
    case = hidden_case(8, 2, 96, (32, 32), weights).near(distance).cast(dtype)
    given, plain = (case.run(op, gain=2**10) for op in (hidden_mse, reference.hidden_mse))
    assert given[0].dtype == torch.float32
    check_rounding(case.defined(reference.hidden_mse, gain=2**10), given, plain=plain)


def test_weight_dtype_may_differ_from_the_student() -> None:
    case = hidden_case(2, 2, 40, (8, 12), "shared+bias", torch.float32)
    student = [tensor.detach().bfloat16().requires_grad_() for tensor in case.student]
    weight, bias = case.leaves[-2:]
    loss = hidden_mse(student, case.teacher, weight=weight, bias=bias)
    gradients = torch.autograd.grad(loss.sum(), [*student, weight, bias])
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("weights", ["none", "shared+bias"])
def test_identical_models_have_no_loss(weights: str) -> None:
    case = hidden_case(1, 2, 50, (16, 16), weights, torch.float32)
    far = loss_and_gradients(hidden_mse, case.leaves, case.student, case.teacher, **case.trained)
    same = case.near(0.0)
    near = loss_and_gradients(hidden_mse, same.leaves, same.student, same.teacher, **same.trained)
    check_rounding(same.defined(reference.hidden_mse), near, scales=far)


@pytest.mark.parametrize("weights", ["none", "shared+bias"])
def test_padding_may_hold_anything(weights: str) -> None:
    case = hidden_case(2, 3, 50, (8, 8), weights)
    mask = masks(3, 50)
    arguments = (hidden_mse, case.leaves, case.student, case.teacher)
    clean = loss_and_gradients(*arguments, mask=mask, **case.trained)
    limits = bounds(case.defined(reference.hidden_mse, mask=mask), clean)[1]
    for tensor in (*case.student, *case.teacher):
        tensor.data.masked_fill_(~mask[..., None], float("nan"))
    dirty = loss_and_gradients(*arguments, mask=mask, **case.trained)
    check_within(dirty, clean, limits)


def test_does_not_depend_on_padding_or_on_the_cut() -> None:
    case = hidden_case(1, 4, 60, (6, 8), "shared")
    mask = masks(4, 60)

    def sums(rows: slice, tokens: int) -> Tensor:
        part = mask[rows, :tokens]
        student, teacher = ([t[rows, :tokens] for t in s] for s in (case.student, case.teacher))
        return hidden_mse(student, teacher, mask=part, **case.trained) * part.sum()

    cut = sums(slice(0, 1), 60) + sums(slice(1, 4), int(mask[1:].sum(1).max()))
    torch.testing.assert_close(cut, sums(slice(0, 4), 60), rtol=1e-12, atol=0)


def test_reads_any_strides() -> None:
    case = hidden_case(2, 3, 33, (8, 8), "shared+bias")
    expected = both(case)[1]
    student = [tensor.mT.contiguous().mT for tensor in case.student]
    teacher = [torch.cat([tensor, tensor], 1)[:, :33] for tensor in case.teacher]
    given = loss_and_gradients(hidden_mse, case.leaves, student, teacher, **case.trained)
    assert max(errors(given, expected)) < 1e-12


def test_pairs_may_differ_in_shape() -> None:
    first = hidden_case(2, 2, 9, (6, 8), "each+bias")
    second = hidden_case(1, 2, 9, (5, 7), "each+bias")
    arguments: dict[str, Any] = {
        name: [first.trained[name][0], second.trained[name][0], first.trained[name][1]]
        for name in ("weight", "bias")
    }
    student = [first.student[0], second.student[0], first.student[1]]
    teacher = [first.teacher[0], second.teacher[0], first.teacher[1]]
    leaves = [*student, *arguments["weight"], *arguments["bias"]]
    given = loss_and_gradients(hidden_mse, leaves, student, teacher, **arguments)
    expected = loss_and_gradients(reference.hidden_mse, leaves, student, teacher, **arguments)
    assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradcheck(weights: str) -> None:
    case = hidden_case(2, 2, 3, (4, 4), weights)

    def loss(*leaves: Tensor) -> Tensor:
        made = case.with_leaves(leaves)
        return hidden_mse(made.student, made.teacher, mask=masks(2, 3), **made.trained)

    assert torch.autograd.gradcheck(loss, case.leaves)


def test_only_what_requires_grad_is_worked_on() -> None:
    """A frozen student still trains the projection; without any gradient nothing is saved."""
    case = hidden_case(1, 2, 20, (4, 6), "shared")
    student = [tensor.detach() for tensor in case.student]
    loss = hidden_mse(student, case.teacher, **case.trained)
    (gradient,) = torch.autograd.grad(loss.sum(), case.leaves[-1:])
    expected = reference.hidden_mse(student, case.teacher, **case.trained)
    (exact,) = torch.autograd.grad(expected.sum(), case.leaves[-1:])
    torch.testing.assert_close(gradient, exact)
    with torch.no_grad():
        assert not hidden_mse(case.student, case.teacher, **case.trained).requires_grad


def test_projected_states_are_never_stored() -> None:
    """Peak memory is the student's gradients and a small rest, below the projected states."""
    case = hidden_case(1, 16, 1024, (32, 1024), "shared", torch.float32)
    projected = 16 * 1024 * 1024 * 4

    def step(op: Any) -> Any:
        loss = op(case.student, case.teacher, **case.trained)
        return torch.autograd.grad(loss.sum(), case.leaves)

    assert peak_bytes(lambda: step(hidden_mse)) < projected / 3
    assert peak_bytes(lambda: step(reference.hidden_mse)) > projected
