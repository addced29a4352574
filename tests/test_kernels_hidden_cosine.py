"""hidden_cosine and hidden_normalized_mse against their definitions; first tokens for all three."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within
from fastkd_kernels import hidden_cosine, hidden_mse, hidden_normalized_mse, reference
from fastkd_kernels.hidden import torch_path
from kernel_cases import errors, hidden_case, loss_and_gradients, masks, peak_bytes
from torch import Tensor
from torch.nn import functional as F

WEIGHTS = ["none", "shared", "each", "shared+bias", "each+bias"]
NORMALIZED = {"cosine": hidden_cosine, "normalized_mse": hidden_normalized_mse}
DEFINITIONS = {
    hidden_mse: reference.hidden_mse,
    hidden_cosine: reference.hidden_cosine,
    hidden_normalized_mse: reference.hidden_normalized_mse,
}


def both(op: Callable[..., Tensor], case: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradients of the op and of its definition on fp64 copies."""
    exact = case.exact()
    given = loss_and_gradients(
        op, case.leaves, case.student, case.teacher, **case.trained, **options
    )
    expected = loss_and_gradients(
        DEFINITIONS[op], exact.leaves, exact.student, exact.teacher, **exact.trained, **options
    )
    return given, expected


@pytest.mark.parametrize("op", NORMALIZED.values(), ids=NORMALIZED)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 130])
def test_equals_its_definition_in_fp64(
    tokens: int,
    pairs: int,
    weights: str,
    op: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # chunks that end within an item and chunks of whole items
    monkeypatch.setattr(torch_path, "CHUNK_BYTES", 12 * 8 * (50 if tokens > 2 else 4))
    widths = (12, 12) if weights == "none" else (7, 12)
    case = hidden_case(pairs, 3, tokens, widths, weights)
    for mask in (None, masks(3, tokens), torch.zeros(3, tokens, dtype=torch.bool)):
        given, expected = both(op, case, mask=mask)
        assert max(errors(given, expected)) < 1e-12


def test_definitions_are_the_published_formulas() -> None:
    case = hidden_case(1, 3, 20, (8, 8), "none")
    own, target = case.student[0], case.teacher[0]
    cosine = 1 - F.cosine_similarity(own, target, dim=-1)
    squares = (F.normalize(own, dim=-1) - F.normalize(target, dim=-1)).square().sum(-1)
    mask = masks(3, 20)
    arguments: Any = (case.student, case.teacher)
    for values, definition in (
        (cosine, reference.hidden_cosine),
        (squares, reference.hidden_normalized_mse),
    ):
        torch.testing.assert_close(definition(*arguments)[0], values.mean())
        torch.testing.assert_close(definition(*arguments, mask=mask)[0], values[mask].mean())
        first = definition(*arguments, mask=mask, tokens="cls")[0]
        torch.testing.assert_close(first, values[:2, 0].mean())


@pytest.mark.parametrize("op", DEFINITIONS)
@pytest.mark.parametrize("weights", ["none", "shared+bias"])
def test_first_tokens_alone(weights: str, op: Callable[..., Tensor]) -> None:
    case = hidden_case(2, 4, 9, (6, 6), weights)
    mask = masks(4, 9)
    mask[1] = mask[1].flip(0)
    for valid in (None, mask):
        given, expected = both(op, case, mask=valid, tokens="cls")
        assert max(errors(given, expected)) < 1e-12
        assert not any(gradient[:, 1:].any() for gradient in given[1:3])
    if op is hidden_mse:
        tinybert, expected = both(op, case, mask=mask, tokens="cls", reduction="tinybert")
        assert max(errors(tinybert, expected)) < 1e-12
        assert tinybert[0][0] != given[0][0]


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("weights", ["none", "shared+bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, weights: str, distance: float
) -> None:
    # several pairs: the error of a single loss may be 0 by chance
    case = hidden_case(8, 2, 96, (32, 32), weights).near(distance).cast(dtype)
    given, plain = (case.run(op, gain=2**10) for op in (hidden_cosine, reference.hidden_cosine))
    assert given[0].dtype == torch.float32
    define = case.defined(reference.hidden_cosine, gain=2**10)
    check_rounding(define, given, plain=plain, inputs=True)


@pytest.mark.parametrize("op", NORMALIZED.values(), ids=NORMALIZED)
@pytest.mark.parametrize("weights", ["none", "shared+bias"])
def test_identical_models_have_no_loss(weights: str, op: Callable[..., Tensor]) -> None:
    case = hidden_case(1, 2, 50, (16, 16), weights, torch.float32)
    far = loss_and_gradients(op, case.leaves, case.student, case.teacher, **case.trained)
    same = case.near(0.0)
    near = loss_and_gradients(op, same.leaves, same.student, same.teacher, **same.trained)
    check_rounding(same.defined(DEFINITIONS[op]), near, scales=far, inputs=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_vectors_have_no_direction(dtype: torch.dtype, backend: Any) -> None:
    """Worth a half beside a vector, nothing beside another; no gradient, and never NaN."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    vector = torch.tensor([3.0, 4.0], dtype=dtype, device=device)
    nothing = torch.zeros_like(vector)
    student = torch.stack([nothing, vector, nothing])[None].requires_grad_()
    teacher = torch.stack([vector, nothing, nothing])[None]
    for token, value in enumerate((0.5, 0.5, 0.0)):
        mask = torch.arange(3, device=device)[None] == token
        loss = hidden_cosine([student], [teacher], mask=mask, backend=backend)
        (gradient,) = torch.autograd.grad(loss.sum(), [student])
        # 3/5 and 4/5 are rounded, and so is the sum of their squares
        assert loss.item() == pytest.approx(value, abs=4 * torch.finfo(torch.float32).eps)
        # and so is the length of the unit vector that is taken out of the residual
        assert gradient.abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("weights", ["none", "shared+bias"])
def test_padding_may_hold_anything(weights: str) -> None:
    case = hidden_case(2, 3, 50, (8, 8), weights)
    mask = masks(3, 50)
    arguments = (hidden_cosine, case.leaves, case.student, case.teacher)
    clean = loss_and_gradients(*arguments, mask=mask, **case.trained)
    define = case.defined(reference.hidden_cosine, mask=mask)
    limits = bounds(define, clean, inputs=True)[1]
    for tensor in (*case.student, *case.teacher):
        tensor.data.masked_fill_(~mask[..., None], float("nan"))
    dirty = loss_and_gradients(*arguments, mask=mask, **case.trained)
    check_within(dirty, clean, limits)


@pytest.mark.parametrize("op", DEFINITIONS)
def test_reads_any_strides(op: Callable[..., Tensor]) -> None:
    case = hidden_case(2, 3, 33, (8, 8), "shared+bias")
    expected = both(op, case)[1]
    student = [tensor.mT.contiguous().mT for tensor in case.student]
    teacher = [torch.cat([tensor, tensor], 1)[:, :33] for tensor in case.teacher]
    given = loss_and_gradients(op, case.leaves, student, teacher, **case.trained)
    assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("op", DEFINITIONS)
def test_gradcheck(op: Callable[..., Tensor], weights: str, tokens: int) -> None:
    case = hidden_case(2, 2, tokens, (4, 4), weights)

    def loss(*leaves: Tensor) -> Tensor:
        made = case.with_leaves(leaves)
        return op(made.student, made.teacher, mask=masks(2, tokens), **made.trained)

    assert torch.autograd.gradcheck(loss, case.leaves)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("weights", ["none", "shared+bias", "each"])
@pytest.mark.parametrize("op", DEFINITIONS)
def test_a_retained_graph_gives_the_same_gradients(
    op: Callable[..., Tensor], weights: str, tokens: int
) -> None:
    """Whatever becomes of those that it gave before; inputs are as they were."""
    case = hidden_case(3, 2, tokens, (6, 6), weights, torch.float32)
    kept = [tensor.detach().clone() for tensor in (*case.leaves, *case.teacher)]
    loss = op(case.student, case.teacher, **case.trained).sum()
    first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(loss, case.leaves)
    assert all(map(torch.equal, second, expected))
    assert all(map(torch.equal, kept, (*case.leaves, *case.teacher)))


@pytest.mark.parametrize("op", DEFINITIONS)
@pytest.mark.parametrize("tokens", [2, 16])
@pytest.mark.parametrize("weights", ["none", "shared+bias", "each"])
@pytest.mark.parametrize("pairs", [1, 6])
def test_no_more_memory_than_the_definition(
    op: Callable[..., Tensor], pairs: int, weights: str, tokens: int
) -> None:
    """Fewer rows than columns, then more: what is kept for the backward differs."""
    widths = (256, 256) if weights == "none" else (128, 256)
    case = hidden_case(pairs, 16, tokens, widths, weights, torch.float32)

    def step(function: Callable[..., Tensor]) -> Any:
        loss = function(case.student, case.teacher, **case.trained)
        return torch.autograd.grad(loss.sum(), case.leaves)

    own, defined = (peak_bytes(lambda f=f: step(f)) for f in (op, DEFINITIONS[op]))  # type: ignore[misc]
    assert own <= 1.05 * defined
