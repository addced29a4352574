"""The Triton kernels of logits_divergence against its definition: interpreted here, or on a GPU.

The interpreter is exact for fp16, fp32 and fp64 and wrong for bf16 products, so bf16 runs on a
GPU only.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within
from device_marks import no_wait
from fastkd_kernels import logits_divergence
from fastkd_kernels.logits_divergence import triton_path
from kernel_cases import fresh_tensors_are_nan
from logits_cases import (
    FORMS,
    KINDS,
    LogitsCase,
    check_precision,
    compared,
    logits_case,
    near_case,
    tensors_of,
)
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ON = ("triton", DEVICE)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
# a GPU makes no products in fp64
EXACT, CLOSE = (torch.float32, 2e-5) if GPU else (torch.float64, 1e-12)


def check_defined(case: LogitsCase) -> None:
    assert compared(case.cast(EXACT), *ON) < CLOSE


def run(case: LogitsCase) -> list[Tensor]:
    return case.on(DEVICE).run(logits_divergence, backend="triton")


@pytest.fixture(autouse=True)
def small_chunks_and_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of four rows, and NaN in every fresh tensor that no program writes."""
    monkeypatch.setattr(triton_path, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(triton_path, "MOST_WORKSPACE_BYTES", 1)
    monkeypatch.setattr(triton_path, "BLOCK_ROWS", 4)
    with fresh_tensors_are_nan():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_definition_in_fp64(kind: str) -> None:
    """Heads with labels, then logits against a head at a temperature, a vocabulary cut on each."""
    case = logits_case((2, 3), FORMS[0], kind=kind, labelled=True, beta=0.3, skew=0.2)
    check_defined(case)
    hot = {"temperature": 2.5, "scale_by_temperature": True} if kind != "mse" else {}
    case = logits_case((5,), FORMS[2], kind=kind, vocabularies=(11, 12), beta=0.3, **hot)
    check_defined(case)


@pytest.mark.parametrize("forms", FORMS[1:], ids="-".join)
def test_either_side_may_be_logits(forms: tuple[str, str]) -> None:
    """The student's vocabulary is cut without labels and read as a whole with them."""
    for labelled, vocabularies in ((False, (13, 9)), (True, (13, 9)), (True, (9, 13))):
        case = logits_case(
            (2, 3), forms, kind="js", vocabularies=vocabularies, labelled=labelled, temperature=3.0
        )
        check_defined(case)


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 2, 1), (3, 2100, 24), (5, 40, 17)])
def test_odd_sizes(rows: int, vocabulary: int, width: int) -> None:
    """One row of two classes, several blocks of columns and parts of the sum, odd strides."""
    case = logits_case(
        (rows,),
        FORMS[0],
        kind="skew_kl",
        vocabularies=(vocabulary, vocabulary),
        widths=(width, width + 1),
        biases=(False, True),
        masked=rows > 1,
    )
    check_defined(case)


def test_the_largest_logits_come_last() -> None:
    """The running sum of exponentials is rescaled when a later block raises the maximum."""
    case = logits_case((2,), FORMS[3], vocabularies=(2100, 2100), labelled=True, masked=False)
    rising = case.mapped(lambda t: t.sort(-1).values)
    check_defined(rising)


@pytest.mark.parametrize("above", [2.0, 20.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, EXACT])
def test_later_blocks_far_above_the_first(dtype: torch.dtype, above: float) -> None:
    """The first block's maximum stands for that of all until exponentials say otherwise."""
    case = logits_case((3,), FORMS[3], vocabularies=(2100, 2100), labelled=True, masked=False)
    raised = torch.zeros(2100, dtype=torch.float64)
    raised[2060:] = above
    case = case.mapped(lambda t: t + raised).cast(dtype)
    check_rounding(case.defined, run(case))


@pytest.mark.parametrize("temperature", [0.001, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mse"])
def test_words_that_are_masked_in_both_models_have_no_part(kind: str, temperature: float) -> None:
    """By the lowest number, which a division, and the step to base 2, carry beyond it."""
    case = logits_case((3,), FORMS[3], kind=kind, vocabularies=(2100, 2100), masked=False)
    case = replace(case.cast(torch.float32), options={"kind": kind, "temperature": temperature})
    some = case.mapped(lambda t: t[:, 2048:] * temperature)
    hidden = torch.finfo(torch.float32).min
    masked = some.mapped(lambda t: torch.cat([torch.full((3, 2048), hidden), t], -1))
    *losses, gradient = run(masked)
    assert not gradient[:, :2048].any()
    check_rounding(some.defined, [*losses, gradient[:, 2048:]])


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
)
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, kind: str, distance: float
) -> None:
    check_precision(near_case("head", distance, 4, kind=kind).cast(dtype), *ON)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_models(kind: str) -> None:
    far = near_case("logits", 1.0, 4, kind=kind).cast(torch.float32)
    same = far.with_leaves([t.clone().requires_grad_() for t in tensors_of(far.teacher)])
    check_rounding(same.defined, run(same), scales=run(far))


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "skew_kl"])
def test_value_is_exact_near_the_teacher(kind: str) -> None:
    case = near_case("logits", 1e-3, 4, kind=kind).cast(torch.float32)
    check_rounding(case.defined, run(case))


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_do_not_overflow(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = [1e4 * torch.randn(3, 33, generator=generator) for _ in range(2)]
    case = LogitsCase(sides[0].requires_grad_(), sides[1], {"kind": kind})
    check_rounding(case.defined, run(case))


@pytest.mark.skipif(GPU, reason="fp64 runs in the interpreter, without a GPU")
def test_gradcheck() -> None:
    case = logits_case(
        (2,),
        FORMS[0],
        kind="js",
        vocabularies=(3, 3),
        widths=(1, 2),
        labelled=True,
        temperature=1.5,
        masked=False,
    )

    def loss(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        made = case.with_leaves(leaves)
        return logits_divergence(made.student, made.teacher, **case.options, backend="triton")

    assert torch.autograd.gradcheck(loss, case.leaves)


@pytest.mark.parametrize("forms", [FORMS[0], FORMS[3]], ids="-".join)
def test_rows_that_do_not_count_may_hold_anything(forms: tuple[str, str]) -> None:
    case = logits_case((2, 4), forms, kind="reverse_kl", labelled=True, dtype=EXACT)
    expected = run(case)
    limits = bounds(case.defined, expected)[1]
    mask = case.options["mask"]
    assert not mask.all()
    for side in (case.student, case.teacher):
        tensors_of(side)[0].data.masked_fill_(~mask[..., None], float("nan"))
    case.options["labels"].masked_fill_(~mask, 10**9)
    check_within(run(case), expected, limits)


def test_nothing_valid_gives_zero() -> None:
    case = logits_case((2, 2), FORMS[0], labelled=True, dtype=EXACT)
    case.options["mask"] = torch.zeros(2, 2, dtype=torch.bool)
    assert not any(value.any() for value in run(case))
    case = logits_case((2, 2), FORMS[3], labelled=True)
    case.options["labels"] = torch.full((2, 2), -100)
    check_defined(case)


@pytest.mark.parametrize("label", [-1, 13])
def test_a_label_outside_the_vocabulary_shows_as_nan(label: int) -> None:
    case = logits_case((3,), FORMS[0], labelled=True, masked=False, dtype=EXACT)
    case.options["labels"][2] = label
    divergence, hard, hidden, *_ = run(case)
    assert divergence.isfinite() and hard.isnan()
    assert hidden[2].isnan().all() and hidden[:2].isfinite().all()


def test_reads_any_strides_and_dtypes() -> None:
    case = logits_case((2, 3), FORMS[0], labelled=True, dtype=EXACT)
    logits = logits_case((2, 3), FORMS[3], labelled=True, dtype=EXACT)
    for made in (case, logits):
        spread = made.mapped(
            lambda t: torch.stack([t, t], 2).flatten(1, 2)[:, ::2] if t.ndim == 3 else t
        )
        turned = spread.mapped(lambda t: t.mT.contiguous().mT if t.ndim > 1 else t)
        expected = run(made)
        limits = bounds(made.defined, expected)[1]
        for other in (spread, turned):
            given = other.run(logits_divergence, backend="triton") if not GPU else run(other)
            check_within(given, expected, limits)
    mixed = logits_case((2, 3), FORMS[0], dtype=torch.float32)
    mixed = mixed.with_leaves(
        [t.detach().half().requires_grad_() if t.ndim == 3 else t for t in mixed.leaves]
    )
    check_rounding(mixed.defined, run(mixed))
    assert [value.dtype for value in run(mixed)[1:]] == [torch.float16, *[torch.float32] * 2]


@pytest.mark.parametrize("labelled", [False, True])
def test_only_what_requires_grad_is_worked_on(labelled: bool) -> None:
    case = logits_case((3,), FORMS[0], labelled=labelled, dtype=EXACT).on(DEVICE)
    whole = run(case)
    for index in range(3):
        leaves = [t.detach().requires_grad_(i == index) for i, t in enumerate(case.leaves)]
        made: Any = logits_divergence(
            case.with_leaves(leaves).student, case.teacher, **case.options, backend="triton"
        )
        total = 0.7 * made[0] - 1.3 * made[1] if labelled else 0.7 * made
        (gradient,) = torch.autograd.grad(total, leaves[index])
        torch.testing.assert_close(gradient, whole[index - 3])


class _Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


def test_launches_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four products and one launch of rows a chunk; the same bits again."""
    counted = []
    for name in ("_row_kernel", "_matmul_kernel"):
        counted.append(_Counted(getattr(triton_path, name)))
        monkeypatch.setattr(triton_path, name, counted[-1])
    case = logits_case((10,), FORMS[0], dtype=torch.float32)
    first = run(case)
    assert [kernel.launches for kernel in counted] == [3, 12]
    assert all(map(torch.equal, first, run(case)))


def test_launch_parameters() -> None:
    launch = triton_path
    half, single = (launch.product_launch(d, True) for d in (torch.bfloat16, torch.float32))
    assert single.constants["PRECISION"] == "tf32x3"
    assert half.constants["BLOCK_ROW"] == 128
    assert launch.product_launch(torch.bfloat16, False).constants["BLOCK_ROW"] == 64
    for blocks, steps in ((1, 500), (12, 500), (300, 500), (1, 3), (7, 9)):
        parts, length = launch.inner_parts(blocks, steps)
        assert parts * length >= steps > (parts - 1) * length
        assert blocks * parts <= max(blocks, launch.PROGRAMS)
    assert launch.row_launch(30522).constants["BLOCK"] == 2048
    assert launch.row_launch(3).constants["BLOCK"] == 16


def test_workspace_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    launch, row_bytes = triton_path, 2 * 128256 * 4
    assert launch.logits_chunk(50, row_bytes, 0) == 50
    small = launch.logits_chunk(8192, 2 * 8192 * 4, 0)
    assert small * 2 * 8192 * 4 == launch.WORKSPACE_BYTES
    rows = launch.logits_chunk(8192, row_bytes, 128256 * 4096 * 4)
    assert rows % launch.BLOCK_ROWS == 0
    assert 0 < rows * row_bytes <= launch.MOST_WORKSPACE_BYTES


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_without_synchronisation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = logits_case(
        (2, 300),
        FORMS[0],
        kind=kind,
        vocabularies=(5003, 5000),
        widths=(256, 320),
        labelled=True,
        dtype=torch.bfloat16,
    )
    check_precision(case, "triton", "cuda")
    case = case.on("cuda")
    with no_wait():
        case.run(logits_divergence)
