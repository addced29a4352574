"""logits_divergence as an operator: opcheck, torch.compile, memory, and every error message."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import LogitsHead, logits_divergence, reference
from fastkd_kernels.logits_divergence import torch_path
from kernel_cases import peak_bytes
from logits_cases import FORMS, LogitsCase, logits_case, tensors_of
from torch import Tensor

GPU = torch.cuda.is_available()
# factor and cap of the student's head, then of the teacher's
FINISHES = [2.0, 3.0, 1.0, float("inf")]
BACKENDS = ["torch", "triton"] if not GPU else ["torch"]


def arguments(case: LogitsCase, labels: Tensor | None) -> tuple[Any, ...]:
    sides = (case.leaves, tensors_of(case.teacher))
    counts = torch.tensor([0.25, 0.5][: 1 if labels is None else 2])
    return (*sides, case.options["mask"], labels, counts, "js", 2.0, 0.3, 4.0, 12, FINISHES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forms", [FORMS[0], FORMS[3]], ids="-".join)
def test_opcheck(forms: tuple[str, str], backend: str) -> None:
    ops = torch.ops.fastkd_kernels
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if backend == "torch":
        tests += ("test_aot_dispatch_static",)
    case = logits_case((1, 4), forms, labelled=True, dtype=torch.float32)
    for labels in (None, case.options["labels"]):
        given = (*arguments(case, labels), True, True, backend)
        torch.library.opcheck(ops.logits_divergence.default, given, test_utils=tests)
    sides = [[t.detach() for t in side] for side in given[:2]]
    backward = (given[4], *sides, *given[2:4], *given[5:])
    torch.library.opcheck(ops.logits_divergence_backward.default, backward)


@pytest.mark.parametrize("labelled", [False, True])
def test_compiles_as_one_graph(labelled: bool) -> None:
    case = logits_case((2, 5), FORMS[0], kind="js", labelled=labelled, dtype=torch.float32)

    def loss(*leaves: Tensor, **options: Any) -> tuple[Tensor, ...]:
        made = logits_divergence(
            case.with_leaves([leaf * 2 for leaf in leaves]).student, case.teacher, **options
        )
        return made if isinstance(made, tuple) else (made,)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        losses = function(*case.leaves, **case.options)
        total = sum(factor * value for factor, value in zip((2, 3), losses, strict=False))
        results.append([*losses, *torch.autograd.grad(total, case.leaves)])
    # the same ops on the same values
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("labelled", [False, True])
def test_logits_are_never_stored(labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory does not grow with the tokens times the vocabulary; the definition's does."""
    monkeypatch.setattr(torch_path, "CHUNK_BYTES", 1 << 20)
    peaks = []
    for rows in (512, 1536):
        case = logits_case(
            (rows,),
            FORMS[0],
            vocabularies=(2048, 2048),
            widths=(16, 16),
            labelled=labelled,
            dtype=torch.float32,
        )
        peaks.append(peak_bytes(lambda case=case: case.run(logits_divergence)))
    logits = 1536 * 2048 * 4
    assert peaks[1] - peaks[0] < logits / 20
    assert peaks[1] < 0.7 * logits
    assert peak_bytes(lambda: case.run(reference.logits_divergence)) > 4 * logits


def head(lead: tuple[int, ...] = (2, 6), width: int = 3, vocabulary: int = 5) -> LogitsHead:
    return LogitsHead(torch.ones(*lead, width), torch.ones(vocabulary, width), None)


def call(student: Any = None, teacher: Any = None, **options: Any) -> Callable[[], Any]:
    own, target = (head() if side is None else side for side in (student, teacher))
    return lambda: logits_divergence(own, target, **options)


FROZEN = head()._replace(weight=torch.ones(5, 3, requires_grad=True))
ERRORS = [
    (call(3), TypeError, r"student must be a LogitsHead\(hidden, weight, bias\) or a .* got int"),
    (call(head()._replace(hidden=None)), TypeError, "student.hidden must be a tensor .* NoneType"),
    (call(head((2, 6, 7))), ValueError, r"student.hidden must be \[batch, tokens, width\]"),
    (call(torch.ones(5)), ValueError, r"student must be \[batch, tokens, vocab\], got shape \(5,"),
    (call(torch.ones(4, 5).long()), TypeError, "student is torch.int64; .*cast it first"),
    (call(torch.ones(4, 0)), ValueError, "student has an empty dimension"),
    (
        call(head()._replace(weight=torch.ones(3, 5))),
        ValueError,
        r"student.weight has shape \(3, 5\) and student.hidden is 3 wide; expected \[vocab, 3\]",
    ),
    (
        call(None, head()._replace(bias=torch.ones(4))),
        ValueError,
        "teacher.bias has 4 entries and teacher.weight 5 rows",
    ),
    (call(None, FROZEN), ValueError, "teacher.weight requires grad, but only the student"),
    (call(None, torch.ones(2, 6, 5, requires_grad=True)), ValueError, "teacher requires grad"),
    (
        call(None, head()._replace(weight=torch.ones(5, 3, device="meta"))),
        ValueError,
        "teacher.weight is on meta and the student is on cpu; move it",
    ),
    (
        call(None, head((6, 2))),
        ValueError,
        r"leading dimensions \(6, 2\); expected .*\(2, 6\); run both models on the same batch",
    ),
    (call(mask=torch.ones(2, 6)), TypeError, "mask is torch.float32; expected a bool tensor"),
    (call(mask=torch.ones(6, 2).bool()), ValueError, r"mask has shape \(6, 2\); .*\(2, 6\)"),
    (call(mask=torch.ones(2, 6, device="meta").bool()), ValueError, "mask is on meta"),
    (call(labels=torch.ones(2, 6).int()), TypeError, "labels is torch.int32; expected an int64"),
    (call(labels=[1]), TypeError, "labels is list; expected an int64"),
    (call(labels=torch.ones(12).long()), ValueError, r"labels has shape \(12,\)"),
    (call(kind="jsd"), ValueError, "kind='jsd' is not known; choose one of kl, reverse_kl, js"),
    (call(temperature="2"), TypeError, "temperature must be a float, got str"),
    (call(temperature=0.0), ValueError, "temperature is 0.0; expected 0.001 to 1000"),
    (call(temperature=float("inf")), ValueError, "temperature is inf"),
    (call(temperature=2000.0), ValueError, "temperature is 2000.0; .*tells scores .*apart"),
    (call(kind="mse", temperature=2.0), ValueError, "compares raw logits, got temperature=2.0"),
    (
        call(beta=1.5),
        ValueError,
        "beta is 1.5; expected 0 or 1, or .* from 0.0001 to 0.9999",
    ),
    (call(beta=1e-9), ValueError, "beta is 1e-09; expected 0 or 1, or a part of the mixture from"),
    (call(skew=1.0), ValueError, "skew is 1.0; expected 0, or a part of the mixture from 0.0001"),
    (call(skew=float("nan")), ValueError, "skew is nan; expected 0, or"),
    (call(skew=None), TypeError, "skew must be a float, got NoneType"),
    (call(head(vocabulary=1)), ValueError, "two shared columns, got 1, .*use kind='mse'"),
    (
        call(head(vocabulary=1), kind="js"),
        ValueError,
        "kind='js' needs at least two shared columns",
    ),
    (call(backend="cuda"), ValueError, "backend='cuda' is not known"),
]


@pytest.mark.parametrize(("function", "kind", "message"), ERRORS)
def test_error_messages(function: Callable[[], Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        function()


def test_regression_takes_mse() -> None:
    student = torch.tensor([[1.0], [3.0]], requires_grad=True)
    loss = logits_divergence(student, torch.zeros(2, 1), kind="mse")
    assert loss == 5.0
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.tensor([[1.0], [3.0]]))
