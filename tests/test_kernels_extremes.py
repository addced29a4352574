"""Where fp32 and fp16 run out of room: large gaps, small shares, teachers of large values."""

import math
from typing import Any

import pytest
import torch
from fastkd_kernels import (
    AttentionState,
    IndexerState,
    attention_divergence,
    hidden_cosine,
    hidden_mse,
    hidden_normalized_mse,
    indexer_divergence,
    logits_divergence,
    reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = [("torch", "cpu"), ("triton", DEVICE)]
EVERY_BACKEND = pytest.mark.parametrize(("backend", "device"), ON, ids=["torch", "triton"])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@EVERY_BACKEND
@pytest.mark.parametrize("gap", [1e2, 1e4, 1e5, 1e7])
def test_js_of_attention_is_at_most_log_two(gap: float, backend: Any, device: str) -> None:
    """One key takes all, another one for the teacher; or several that tie."""
    keys = torch.eye(16, device=device)[None, None]
    steps = torch.randn(1, 1, 16, 16, generator=seeded())
    for own, other in ((steps, -steps), (steps.round(), -steps.round())):
        states = [
            [AttentionState((gap * side).to(device), keys, None, 1.0)] for side in (own, other)
        ]
        given = attention_divergence(*states, kind="js", backend=backend).item()
        exact = [
            [s._replace(query=s.query.double().cpu(), key=s.key.double().cpu()) for s in side]
            for side in states
        ]
        expected = reference.attention_divergence(*exact, kind="js").item()
        few = 4 * torch.finfo(torch.float32).eps
        assert given <= math.log(2) * (1 + few)
        assert given == pytest.approx(expected, rel=few)


@EVERY_BACKEND
@pytest.mark.parametrize("share", [1e-4, 1e-3, 0.1, 0.999, 0.9999])
@pytest.mark.parametrize(("kind", "name"), [("js", "beta"), ("skew_kl", "skew")])
def test_small_shares_keep_the_digits_of_fp32(
    kind: Any, name: str, share: float, backend: Any, device: str
) -> None:
    """A mixture that is nearly one side: at most twice the error of plain PyTorch, or roundings."""
    own, target = (3 * torch.randn(64, 50, generator=seeded().manual_seed(i)) for i in range(2))
    options: dict[str, Any] = {"kind": kind, name: share}

    def run(op: Any, dtype: torch.dtype, device: str, **how: Any) -> list[torch.Tensor]:
        leaf = own.to(device, dtype).requires_grad_()
        loss = op(leaf, target.to(device, dtype), **options, **how)
        return [loss.detach().double().cpu(), torch.autograd.grad(loss, leaf)[0].double().cpu()]

    exact = run(reference.logits_divergence, torch.float64, "cpu")
    plain = run(reference.logits_divergence, torch.float32, "cpu")
    given = run(logits_divergence, torch.float32, device, backend=backend)
    for mine, theirs, true in zip(given, plain, exact, strict=True):
        few = 16 * torch.finfo(torch.float32).eps * true.norm()
        assert (mine - true).norm() <= max(2 * (theirs - true).norm(), few)


@EVERY_BACKEND
@pytest.mark.parametrize("projected", [False, True])
def test_squares_beyond_fp16_are_summed_in_fp32(projected: bool, backend: Any, device: str) -> None:
    """A teacher of 1e4, whose squares are past fp16's largest number."""
    width = 16
    student = torch.randn(2, 8, width, generator=seeded()).to(device).half().requires_grad_()
    teacher = (1e4 * torch.randn(2, 8, width, generator=seeded())).to(device).half()
    weight = torch.eye(width, device=device).half().requires_grad_() if projected else None
    loss = hidden_mse([student], [teacher], weight=weight, backend=backend)
    expected = (student.double() - teacher.double()).square().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@EVERY_BACKEND
@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "skew_kl", "cross_entropy"])
@pytest.mark.parametrize("labelled", [False, True])
def test_words_masked_by_the_lowest_number_count_for_nothing_at_any_temperature(
    kind: Any, labelled: bool, backend: Any, device: str
) -> None:
    """As without them, which the division of that number by less than 1 must not change."""
    # more words than a block has, so that the last one is cut
    student, teacher = (3 * torch.randn(2, 1, 40, generator=seeded())).to(device)
    lowest = torch.full((1, 3), torch.finfo(torch.float32).min, device=device)
    labels = torch.tensor([7], device=device) if labelled else None
    for temperature in (0.3, 1.0):
        options: dict[str, Any] = {"kind": kind, "temperature": temperature, "labels": labels}
        found = []
        for masked in (False, True):
            leaf = student.clone().requires_grad_()
            sides = [torch.cat([of, lowest], 1) if masked else of for of in (leaf, teacher)]
            loss = logits_divergence(sides[0], sides[1], backend=backend, **options)
            total = sum(loss) if isinstance(loss, tuple) else loss
            found.append([total.detach(), *torch.autograd.grad(total, leaf)])
        for given, expected in zip(*found, strict=True):
            torch.testing.assert_close(expected, given, rtol=1e-5, atol=1e-6)


@EVERY_BACKEND
def test_logits_that_are_no_numbers_still_show(backend: Any, device: str) -> None:
    for value in (math.nan, math.inf):
        student, teacher = torch.randn(2, 1, 40, generator=seeded()).to(device)
        student[0, 3] = value
        assert logits_divergence(student, teacher, temperature=0.3, backend=backend).isnan()


@EVERY_BACKEND
def test_a_row_of_lowest_numbers_is_even(backend: Any, device: str) -> None:
    student = torch.full((1, 40), torch.finfo(torch.float32).min, device=device)
    teacher = torch.randn(1, 40, generator=seeded()).to(device)
    found = logits_divergence(student, teacher, temperature=0.5, backend=backend)
    expected = reference.logits_divergence(0 * teacher, teacher.double(), temperature=0.5)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@EVERY_BACKEND
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_norms_beyond_fp32_are_no_zero_vectors(
    side: str, projected: bool, backend: Any, device: str
) -> None:
    """Visible as NaN, by the definition in fp32 too."""
    student, teacher = torch.randn(2, 1, 3, 8, generator=seeded()).to(device)
    (student if side == "student" else teacher)[0, 1] *= 1e25
    leaf = student.requires_grad_()
    weight = torch.eye(8, device=device) if projected else None
    for op in (hidden_cosine, hidden_normalized_mse):
        loss = op([leaf], [teacher], weight=weight, backend=backend)
        assert loss.isnan().all()
        (gradient,) = torch.autograd.grad(loss, leaf)
        # of other rows it is what it was
        assert gradient[0, 1].isnan().any() and gradient[0, ::2].isfinite().all()
        defined = getattr(reference, op.__name__)([leaf], [teacher], weight=weight)
        assert defined.isnan().all()


@EVERY_BACKEND
@pytest.mark.parametrize("place", ["query", "key", "teacher_query", "teacher_key"])
def test_an_indexer_shows_what_is_no_number(place: str, backend: Any, device: str) -> None:
    names = ("query", "key", "teacher_query", "teacher_key")
    made = torch.randn(4, 1, 2, 6, 4, generator=seeded()).to(device)
    tensors = dict(zip(names, made, strict=True))
    tensors[place][0, 0, 0, 0] = math.nan
    weights = torch.ones(1, 6, 2, device=device)
    indexer = IndexerState(tensors["query"], tensors["key"][:, :1], weights)
    teacher = AttentionState(tensors["teacher_query"], tensors["teacher_key"], None, 0.5)
    assert indexer_divergence([indexer], [teacher], backend=backend).isnan().all()
