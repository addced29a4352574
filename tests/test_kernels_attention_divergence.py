"""attention_divergence on the CPU against its definition: values, gradients, masks, memory."""

from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within, distance, plain_loss_error
from divergence_cases import (
    KINDS,
    defined,
    divergence_both,
    exactly_defined,
    holes,
    near_states,
)
from fastkd_kernels import AttentionState, attention_divergence
from fastkd_kernels.attention_divergence.torch_path import key_range
from kernel_cases import (
    attention_states,
    cast,
    errors,
    leaves_of,
    loss_and_gradients,
    masks,
    peak_bytes,
    trained,
)
from torch import Tensor

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
# (kv_heads, dims) of student, teacher with 6 heads
HEADS = [((6, 6), (8, 8)), ((2, 3), (5, 8)), ((1, 6), (8, 8)), ((6, 2), (5, 8))]
SHAPES = [(False, None), (True, None), (False, 7), (True, 7), (False, 1), (True, 10**6)]


@EVERY_KIND
@pytest.mark.parametrize("tokens", [1, 90])
@pytest.mark.parametrize(("kv_heads", "dims"), HEADS)
def test_equals_its_definition_in_fp64(kv_heads: Any, dims: Any, tokens: int, kind: str) -> None:
    states = attention_states(2, 2, 6, tokens, dims, kv_heads=kv_heads)
    valid = masks(2, tokens)
    for key_mask, query_mask in ((None, None), (valid, None), (None, valid), (valid, valid)):
        options = {"key_mask": key_mask, "query_mask": query_mask, "temperature": 0.7}
        given, expected = divergence_both(states, kind=kind, **options)
        assert max(errors(given, expected)) < 1e-12


@EVERY_KIND
@pytest.mark.parametrize(("causal", "window"), SHAPES)
def test_causal_and_windowed_rows(causal: bool, window: int | None, kind: str) -> None:
    states = attention_states(1, 2, 4, 70, (5, 8), kv_heads=(2, 4))
    mask = holes(2, 70)
    for key_mask, query_mask in ((None, None), (mask, None), (mask, mask)):
        options: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask}
        given, expected = divergence_both(
            states, kind=kind, causal=causal, window=window, **options
        )
        assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_rows_see_the_keys_of_their_windows(causal: bool) -> None:
    """Only those keys are read, so that a window takes linear time."""
    for window in (0, 1, 5, 64):
        ahead = torch.arange(64)[None, :] - torch.arange(64)[:, None]
        seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
        if window:
            seen = seen & (ahead.abs() < window)
        for start, stop in ((0, 1), (0, 16), (16, 32), (50, 64)):
            columns = seen[start:stop].any(0).nonzero()
            first, last = key_range(start, stop, 64, causal, window)
            assert (first, last) == (int(columns.min()), int(columns.max()) + 1)


@EVERY_KIND
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, distance: float, kind: str
) -> None:
    """At most twice the error of plain PyTorch, or what rounding does to the definition."""
    states = near_states(distance, dtype, heads=2, tokens=96, dim=16)
    given, _ = divergence_both(states, kind=kind, gain=2**10)
    plain = defined(states, kind=kind, gain=2**10)
    check_rounding(exactly_defined(states, kind=kind, gain=2**10), given, plain=plain)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "cosine"])
def test_losses_near_the_teacher_keep_digits_that_plain_pytorch_loses(kind: str) -> None:
    states = near_states(1e-3, torch.float32, heads=2, tokens=96, dim=16)
    given, expected = divergence_both(states, kind=kind)
    define = exactly_defined(states, kind=kind)
    if kind in ("kl", "reverse_kl"):
        # whose terms of first order are taken off as a sum
        assert 4 * distance(given[0], expected[0]) <= plain_loss_error(define)
        return
    check_rounding(define, given)
    with pytest.raises(AssertionError, match=r"output 0: .* above"):
        check_rounding(define, defined(states, kind=kind))


@EVERY_KIND
def test_student_equal_to_teacher(kind: str) -> None:
    """Loss 0 within rounding (cross-entropy: the teacher's entropy) and no gradient."""
    distant, teacher = attention_states(1, 2, 4, 64, (16, 16), dtype=torch.float32)
    same = trained(cast(teacher, torch.float32))
    near_zero = loss_and_gradients(attention_divergence, leaves_of(same), same, teacher, kind=kind)
    far = loss_and_gradients(attention_divergence, leaves_of(distant), distant, teacher, kind=kind)
    check_rounding(exactly_defined((same, teacher), kind=kind), near_zero, scales=far)
    assert near_zero[0].item() >= 0.0


@EVERY_KIND
def test_models_far_apart(kind: str) -> None:
    """Scores of hundreds, where probabilities underflow: finite, and equal to the definition."""
    student, teacher = attention_states(1, 1, 2, 40, (8, 8), dtype=torch.float32)
    states = [s._replace(scale=20.0) for s in student], [t._replace(scale=25.0) for t in teacher]
    given, _ = divergence_both(states, kind=kind)
    check_rounding(exactly_defined(states, kind=kind), given)


@EVERY_KIND
def test_nothing_valid_gives_zero(kind: str) -> None:
    student, teacher = attention_states(2, 2, 3, 9, (4, 4), dtype=torch.float32)
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    for name in ("key_mask", "query_mask"):
        for value in loss_and_gradients(
            attention_divergence, leaves_of(student), student, teacher, kind=kind, **{name: nothing}
        ):
            assert torch.equal(value, torch.zeros_like(value))


@EVERY_KIND
def test_padding_may_hold_anything(kind: str) -> None:
    """NaN at padded tokens reaches neither the loss nor a gradient."""
    student, teacher = attention_states(1, 3, 4, 50, (6, 6), kv_heads=(2, 4))
    valid = masks(3, 50)
    options: dict[str, Any] = {"key_mask": valid, "query_mask": valid, "kind": kind}
    clean = loss_and_gradients(
        attention_divergence, leaves_of(student), student, teacher, **options
    )
    limits = bounds(exactly_defined((student, teacher), **options), clean)[1]
    for state in (*student, *teacher):
        for tensor in (state.query, state.key):
            tensor.data.masked_fill_(~valid[:, None, :, None], float("nan"))
    dirty = loss_and_gradients(
        attention_divergence, leaves_of(student), student, teacher, **options
    )
    check_within(dirty, clean, limits)


@pytest.mark.parametrize("window", [None, 8])
def test_does_not_depend_on_padding_or_on_the_cut(window: int | None) -> None:
    student, teacher = attention_states(1, 4, 3, 60, (6, 6))
    valid = masks(4, 60)

    def sums(rows: slice, tokens: int) -> Tensor:
        """Loss times what it divides by, for a part of the batch padded to `tokens`."""
        mask = valid[rows, :tokens]
        part = [
            [s._replace(query=s.query[rows, :, :tokens], key=s.key[rows, :, :tokens]) for s in side]
            for side in (student, teacher)
        ]
        loss = attention_divergence(*part, key_mask=mask, query_mask=mask, window=window)
        return loss * mask.sum() * 3

    longest = int(valid[1:].sum(1).max())
    cut = sums(slice(0, 1), 60) + sums(slice(1, 4), longest)
    torch.testing.assert_close(cut, sums(slice(0, 4), 60), rtol=1e-12, atol=0)


def test_reads_any_strides_and_expanded_heads() -> None:
    student, teacher = attention_states(2, 2, 4, 33, (6, 6), kv_heads=(1, 1))
    expected = divergence_both((student, teacher))[1]
    spread = [
        s._replace(
            query=s.query.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        )
        for s in student
    ]
    wide = [s._replace(key=s.key.expand(-1, 4, -1, -1)) for s in spread]
    target = [t._replace(key=t.key.mT.contiguous().mT.expand(-1, 4, -1, -1)) for t in teacher]
    given = loss_and_gradients(attention_divergence, leaves_of(spread), wide, target)
    assert max(errors(given, expected)) < 1e-12


def test_pairs_and_dtypes_may_differ() -> None:
    first = attention_states(2, 2, 4, 20, (6, 6), dtype=torch.float32)
    second = attention_states(1, 2, 4, 20, (3, 8), seed=7, dtype=torch.float32)
    student = [first[0][0], second[0][0], first[0][1]]
    teacher = cast([first[1][0], second[1][0], first[1][1]], torch.float16)
    given, _ = divergence_both((student, teacher))
    assert given[0].dtype == torch.float32
    check_rounding(exactly_defined((student, teacher)), given)


@EVERY_KIND
def test_gradcheck(kind: str) -> None:
    student, teacher = attention_states(1, 2, 2, 4, (2, 3), kv_heads=(1, 2))
    valid = masks(2, 4)

    def loss(*tensors: Tensor) -> Tensor:
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        own = [AttentionState(query, key, None, 0.7) for query, key in pairs]
        return attention_divergence(own, teacher, key_mask=valid, causal=True, kind=kind)

    assert torch.autograd.gradcheck(loss, leaves_of(student))


def test_inputs_stay_as_they_are_and_teacher_gets_nothing() -> None:
    student, teacher = attention_states(1, 1, 2, 20, (4, 4))
    before = [tensor.clone() for state in (*student, *teacher) for tensor in state[:2]]
    attention_divergence(student, teacher).sum().backward()
    after = [tensor for state in (*student, *teacher) for tensor in state[:2]]
    assert all(map(torch.equal, before, after))
    assert student[0].query.grad is not None
    assert teacher[0].query.grad is None


def test_temperature_divides_the_scores_and_nothing_else() -> None:
    student, teacher = attention_states(1, 1, 2, 20, (4, 4))
    cold = [[s._replace(scale=s.scale / 3) for s in side] for side in (student, teacher)]
    given = attention_divergence(student, teacher, temperature=3)
    torch.testing.assert_close(given, attention_divergence(*cold), rtol=1e-12, atol=0)


@EVERY_KIND
def test_memory_grows_with_tokens_not_with_their_square(kind: str) -> None:
    def peak(tokens: int) -> int:
        student, teacher = attention_states(1, 1, 2, tokens, (16, 32), dtype=torch.float32)
        leaves = leaves_of(student)
        return peak_bytes(
            lambda: torch.autograd.grad(
                attention_divergence(student, teacher, kind=kind).sum(), leaves
            )
        )

    # blocks of scores, then queries, keys, and their gradients in fp32
    assert peak(2048) < 2.2 * peak(1024) < 16e6
