"""logits_divergence on the CPU against its definition: values, gradients, masks, labels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within
from fastkd_kernels import LogitsHead, logits_divergence, reference
from fastkd_kernels.logits_divergence import torch_path
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


@pytest.fixture(autouse=True)
def small_chunks_and_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks even here, and NaN in every fresh tensor that nothing writes."""
    monkeypatch.setattr(torch_path, "CHUNK_BYTES", 400)
    monkeypatch.setattr(torch_path, "CHUNK_PART", 1 << 20)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("forms", FORMS, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_definition_in_fp64(kind: str, forms: tuple[str, str]) -> None:
    hot = {"temperature": 2.5, "scale_by_temperature": True} if kind != "mse" else {}
    for labelled, vocabularies, options in ((False, (13, 12), hot), (True, (11, 12), {})):
        for lead in ((2, 5), (7,)):
            case = logits_case(
                lead,
                forms,
                kind=kind,
                vocabularies=vocabularies,
                labelled=labelled,
                beta=0.3,
                skew=0.2,
                **options,
            )
            assert compared(case, "torch") < 1e-12


@pytest.mark.parametrize(("vocabularies", "labelled"), [((13, 9), True), ((9, 13), True)])
def test_labels_count_over_the_whole_vocabulary(
    vocabularies: tuple[int, int], labelled: bool
) -> None:
    """The divergence stays on the shared prefix; at temperature 3 only the divergence is warm."""
    for forms in (FORMS[0], FORMS[3]):
        case = logits_case(
            (2, 6),
            forms,
            kind="js",
            vocabularies=vocabularies,
            labelled=labelled,
            temperature=3.0,
            masked=False,
        )
        assert compared(case, "torch") < 1e-12


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 2, 1), (3, 1100, 24), (70, 40, 17)])
def test_odd_sizes(rows: int, vocabulary: int, width: int) -> None:
    """One row of two classes, several blocks of columns, rows that do not fill a block."""
    case = logits_case(
        (rows,),
        FORMS[0],
        kind="skew_kl",
        vocabularies=(vocabulary, vocabulary),
        widths=(width, width + 1),
        biases=(False, True),
        masked=rows > 1,
    )
    assert compared(case, "torch") < 1e-12


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, kind: str, distance: float
) -> None:
    for form in ("head", "logits"):
        check_precision(near_case(form, distance, kind=kind).cast(dtype), "torch")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mse", "cross_entropy")])
def test_value_is_exact_near_the_teacher(kind: str) -> None:
    """Sums of second order, where the definition loses every digit in fp32."""
    case = near_case("logits", 1e-3, kind=kind).cast(torch.float32)
    given, plain = (case.run(op) for op in (logits_divergence, reference.logits_divergence))
    check_rounding(case.defined, given)
    with pytest.raises(AssertionError, match=r"output 0: .* above"):
        check_rounding(case.defined, plain)


@pytest.mark.parametrize("form", ["head", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_identical_models(kind: str, form: str) -> None:
    far = near_case(form, 1.0, kind=kind).cast(torch.float32)
    same = far.with_leaves([t.clone().requires_grad_() for t in tensors_of(far.teacher)])
    zero, scale = (case.run(logits_divergence) for case in (same, far))
    check_rounding(same.defined, zero, scales=scale)


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_do_not_overflow(kind: str) -> None:
    """Probabilities of 0 on either side add 0, not NaN."""
    generator = torch.Generator().manual_seed(0)
    sides = [1e4 * torch.randn(6, 33, generator=generator) for _ in range(2)]
    case = LogitsCase(sides[0].requires_grad_(), sides[1], {"kind": kind})
    check_rounding(case.defined, case.run(logits_divergence))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    case = logits_case(
        (3,),
        FORMS[0],
        kind=kind,
        vocabularies=(4, 3),
        widths=(2, 2),
        labelled=True,
        temperature=1.0 if kind == "mse" else 1.5,
        masked=False,
    )

    def loss(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        made = case.with_leaves(leaves)
        return logits_divergence(made.student, made.teacher, **case.options)

    assert torch.autograd.gradcheck(loss, case.leaves)


@pytest.mark.parametrize("forms", [FORMS[0], FORMS[3]], ids="-".join)
def test_rows_that_do_not_count_may_hold_anything(forms: tuple[str, str]) -> None:
    case = logits_case((3, 7), forms, kind="reverse_kl", labelled=True)
    expected = case.run(logits_divergence)
    limits = bounds(case.defined, expected)[1]
    mask = case.options["mask"]
    for side in (case.student, case.teacher):
        tensors_of(side)[0].data.masked_fill_(~mask[..., None], float("nan"))
    case.options["labels"].masked_fill_(~mask, 10**9)
    given = case.run(logits_divergence)
    check_within(given, expected, limits)


def test_nothing_valid_gives_zero() -> None:
    for forms in (FORMS[0], FORMS[3]):
        case = logits_case((2, 4), forms, kind="kl", labelled=True)
        case.options["mask"] = torch.zeros(2, 4, dtype=torch.bool)
        for value in case.run(logits_divergence):
            assert not value.any()
        case = logits_case((2, 4), forms, kind="kl", labelled=True)
        case.options["labels"] = torch.full((2, 4), -100)
        assert compared(case, "torch") < 1e-12


@pytest.mark.parametrize("label", [-1, 13, 10**9])
def test_a_label_outside_the_vocabulary_shows_as_nan(label: int) -> None:
    case = logits_case((5,), FORMS[0], labelled=True, masked=False)
    case.options["labels"][2] = label
    divergence, hard, hidden, *_ = case.run(logits_divergence)
    assert divergence.isfinite() and hard.isnan()
    assert hidden[2].isnan().all() and hidden[:2].isfinite().all()


def test_reads_any_strides_and_leaves_inputs_alone() -> None:
    case = logits_case((3, 5), FORMS[0], kind="js", labelled=True)
    logits = logits_case((3, 5), FORMS[3], kind="js", labelled=True)
    for made in (case, logits):
        expected = made.run(logits_divergence)
        limits = bounds(made.defined, expected)[1]
        # every second token of a longer sequence, transposed weights, sliced logits
        spread = made.mapped(
            lambda t: torch.stack([t, t], 2).flatten(1, 2)[:, ::2] if t.ndim == 3 else t
        )
        turned = spread.mapped(lambda t: t.mT.contiguous().mT if t.ndim > 1 else t)
        before = [t.clone() for t in (*turned.leaves, *tensors_of(turned.teacher))]
        for other in (spread, turned):
            check_within(other.run(logits_divergence), expected, limits)
        after = [*turned.leaves, *tensors_of(turned.teacher)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_does_not_depend_on_padding_or_on_the_cut() -> None:
    case = logits_case((4, 6), FORMS[0], kind="skew_kl")
    mask = case.options["mask"]
    assert isinstance(case.student, LogitsHead) and isinstance(case.teacher, LogitsHead)

    def sums(rows: slice) -> Tensor:
        sides = [side._replace(hidden=side.hidden[rows]) for side in (case.student, case.teacher)]
        value = logits_divergence(*sides, kind="skew_kl", mask=mask[rows])
        return value * mask[rows].sum()

    cut = sums(slice(0, 1)) + sums(slice(1, 4))
    torch.testing.assert_close(cut, sums(slice(0, 4)), rtol=1e-12, atol=0)


def test_dtypes_may_differ() -> None:
    case = logits_case((4, 5), FORMS[0], kind="kl", dtype=torch.float32)
    assert isinstance(case.student, LogitsHead)
    student = case.student._replace(hidden=case.student.hidden.detach().half().requires_grad_())
    case = LogitsCase(student, case.teacher, case.options)
    made = case.run(logits_divergence)
    check_rounding(case.defined, made)
    assert [value.dtype for value in made] == [torch.float32, torch.float16, *[torch.float32] * 2]


@pytest.mark.parametrize("labelled", [False, True])
def test_only_what_requires_grad_is_worked_on(labelled: bool) -> None:
    """A frozen hidden state, a frozen weight, and no gradient at all."""
    case = logits_case((4, 3), FORMS[0], labelled=labelled)
    whole = case.run(logits_divergence)
    losses = len(whole) - 3
    for index in range(3):
        leaves = [t.detach().requires_grad_(i == index) for i, t in enumerate(case.leaves)]
        made: Any = logits_divergence(LogitsHead(*leaves), case.teacher, **case.options)
        total = 0.7 * made[0] - 1.3 * made[1] if labelled else 0.7 * made
        (gradient,) = torch.autograd.grad(total, leaves[index])
        torch.testing.assert_close(gradient, whole[losses + index])
    with torch.no_grad():
        made = logits_divergence(case.student, case.teacher, **case.options)
    for own, expected in zip(made if labelled else (made,), whole, strict=False):
        assert torch.equal(own, expected)


def test_repeats_bit_for_bit() -> None:
    case = logits_case((4, 9), FORMS[0], labelled=True, dtype=torch.float32)
    runs = [case.run(logits_divergence) for _ in range(2)]
    assert all(map(torch.equal, *runs))
    assert all(value.isfinite().all() for value in runs[0])
