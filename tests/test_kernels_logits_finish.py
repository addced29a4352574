"""Heads that scale and cap what their last layer gives: logits_divergence of both backends."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conditioning import check_rounding
from fastkd_kernels import LogitsHead, logits_divergence, reference
from fastkd_kernels.logits_divergence import torch_path, triton_path
from fastkd_kernels.logits_divergence.reference import logits_of
from kernel_cases import fresh_tensors_are_nan
from logits_cases import (
    FORMS,
    KINDS,
    Finish,
    LogitsCase,
    check_precision,
    compared,
    logits_case,
    near_case,
    tensors_of,
)
from torch import Tensor

GPU = torch.cuda.is_available()
BACKENDS = ("torch", "triton")
# Granite and Cohere, Gemma 2, and what has both
FINISHES: list[tuple[Finish, Finish]] = [
    ((0.5, None), (3.0, None)),
    ((1.0, 2.0), (1.0, 4.0)),
    ((-1.5, 2.0), (0.25, None)),
    ((1.0, None), (2.0, 1.5)),
]


@pytest.fixture(autouse=True)
def small_chunks_and_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks even here, and NaN in every fresh tensor that nothing writes."""
    monkeypatch.setattr(torch_path, "CHUNK_BYTES", 400)
    monkeypatch.setattr(torch_path, "CHUNK_PART", 1 << 20)
    for name, value in (("WORKSPACE_BYTES", 1), ("MOST_WORKSPACE_BYTES", 1), ("BLOCK_ROWS", 4)):
        monkeypatch.setattr(triton_path, name, value)
    with fresh_tensors_are_nan():
        yield


def on(backend: str) -> tuple[str, str]:
    return backend, "cuda" if GPU and backend == "triton" else "cpu"


def check_defined(case: LogitsCase, backend: str) -> None:
    exact = not GPU or backend == "torch"
    made = case.cast(torch.float64 if exact else torch.float32)
    assert compared(made, *on(backend)) < (1e-12 if exact else 2e-5)


@pytest.mark.parametrize("finishes", FINISHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_its_definition_in_fp64(
    backend: str, kind: str, finishes: tuple[Finish, Finish]
) -> None:
    options: dict[str, Any] = {"kind": kind, "finishes": finishes, "beta": 0.3, "skew": 0.2}
    check_defined(logits_case((2, 3), FORMS[0], labelled=True, **options), backend)
    if kind != "mse":
        options |= {"temperature": 0.5, "scale_by_temperature": True}
    for forms in (FORMS[0], FORMS[1], FORMS[2]):
        check_defined(logits_case((5,), forms, vocabularies=(11, 12), **options), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_columns_have_no_part_in_a_softmax(backend: str) -> None:
    """Logits far below 0, where a column of the last block that were 0 would be all."""
    for vocabulary in (1100, 2100):
        case = logits_case(
            (2,),
            FORMS[0],
            vocabularies=(vocabulary, vocabulary),
            biases=(True, True),
            labelled=True,
            finishes=((1.0, 300.0), (0.5, None)),
        )
        low = case.mapped(lambda tensor: tensor - 400.0 if tensor.ndim == 1 else tensor)
        check_defined(low, backend)
        assert compared(low.cast(torch.float32), *on(backend)) < 1e-3


def test_is_what_gemma_and_cohere_compute() -> None:
    case = logits_case((2, 3), FORMS[0], masked=False)
    student = case.student
    assert isinstance(student, LogitsHead)
    given = torch.nn.functional.linear(*student[:3])
    for finish, expected in (
        ((1.0, 30.0), torch.tanh(given / 30.0) * 30.0),
        ((0.0625, None), given * 0.0625),
        ((1 / 8.0, None), given / 8.0),
    ):
        head = LogitsHead(*student[:3], *finish)
        made = logits_of(head)
        torch.testing.assert_close(made, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_stays_near_plain_pytorch(backend: str, kind: str, distance: float) -> None:
    case = finished(near_case("head", distance, 4, kind=kind), (0.5, 3.0))
    check_precision(case.cast(torch.float32), *on(backend))
    check_precision(case.cast(torch.float16), *on(backend))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_models(backend: str, kind: str) -> None:
    far = finished(near_case("head", 1.0, 4, kind=kind), (0.5, 3.0)).cast(torch.float32)
    same = far.with_leaves([t.clone().requires_grad_() for t in tensors_of(far.teacher)])
    name, device = on(backend)
    zero, scale = (c.on(device).run(logits_divergence, backend=name) for c in (same, far))
    check_rounding(same.defined, [t.cpu() for t in zero], scales=[t.cpu() for t in scale])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cap_that_is_reached_has_a_gradient_that_is_small_and_finite(
    backend: str, kind: str
) -> None:
    """Logits of 40 under a cap of 4: a slope of 4e-9, of which 1 - tanh^2 has no digit in fp32."""
    case = logits_case(
        (3,), FORMS[0], kind=kind, masked=False, biases=(False, False), finishes=((1.0, 4.0),) * 2
    )
    high = case.mapped(lambda t: 40.0 * t.sign() if t.shape[0] != 3 else t.sign() / t.shape[-1])
    name, device = on(backend)
    given = high.cast(torch.float32).on(device).run(logits_divergence, backend=name)
    expected = high.run(reference.logits_divergence)
    gradients = [(a.cpu().double(), b) for a, b in zip(given, expected, strict=True)][1:]
    assert all(float(b.abs().max()) > 0 for _, b in gradients)
    for made, definition in gradients:
        torch.testing.assert_close(
            made, definition, rtol=1e-4, atol=1e-5 * float(definition.abs().max())
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    case = logits_case(
        (3,), FORMS[0], kind=kind, vocabularies=(4, 3), widths=(2, 2), labelled=True, masked=False,
        finishes=((0.5, 2.0), (2.0, 3.0)), temperature=1.0 if kind == "mse" else 1.5,
    )  # fmt: skip

    def loss(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        made = case.with_leaves(leaves)
        return logits_divergence(made.student, made.teacher, **case.options)

    assert torch.autograd.gradcheck(loss, case.leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_finish_is_another_plan(backend: str) -> None:
    """Calls that look alike share a plan; these do not."""
    case = logits_case((2, 3), FORMS[0], dtype=torch.float32)
    for finish in ((1.0, None), (2.0, None), (1.0, 2.0), (2.0, 2.0), (2, 2), (1.0, None)):
        given = finished(case, finish, of="student")
        assert compared(given, *on(backend)) < 1e-4
        assert compared(finished(case, finish, of="teacher"), *on(backend)) < 1e-4


@pytest.mark.parametrize(
    ("finish", "kind", "message"),
    [
        ((0.0, None), ValueError, "teacher.scale is 0.0; expected a factor of a size from 1e-20"),
        ((math.nan, None), ValueError, "teacher.scale is nan"),
        (("2", None), TypeError, "teacher.scale must be a float, got str"),
        ((1.0, 0.0), ValueError, r"teacher.softcap is 0.0; expected .* or None for no cap"),
        ((1.0, math.inf), ValueError, "teacher.softcap is inf; expected"),
        ((1.0, "30"), TypeError, "teacher.softcap must be a float or None, got str"),
    ],
)
def test_error_messages(finish: Any, kind: Any, message: str) -> None:
    case = finished(logits_case((2, 3), FORMS[0]), finish, of="teacher")
    with pytest.raises(kind, match=message):
        logits_divergence(case.student, case.teacher)


def finished(case: LogitsCase, finish: Any, of: str = "both") -> LogitsCase:
    """The case with other numbers of its heads."""

    def side(name: str) -> Any:
        head = getattr(case, name)
        return LogitsHead(*head[:3], *finish) if of in (name, "both") else head

    return LogitsCase(side("student"), side("teacher"), case.options, case.gain)
