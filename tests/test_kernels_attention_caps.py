"""Soft caps and attention sinks on the CPU: definition, transformers, masks, precision, errors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caps_cases import (
    FORMS,
    cast,
    defined,
    exact,
    formed,
    leaves_of,
    near_states,
    no_worse,
    op_of,
    trained,
)
from divergence_cases import KINDS, holes
from fastkd_kernels import (
    AttentionState,
    attention_divergence,
    attention_score_mse,
    reference,
    relation_divergence,
)
from fastkd_kernels.attention_divergence.reference import log_probabilities, visible_keys
from fastkd_kernels.common import head_groups
from kernel_cases import attention_states, errors, loss_and_gradients, masks, peak_bytes
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
WITH_SINKS = pytest.mark.parametrize("form", ["sinks", "caps and sinks"])


@EVERY_KIND
@EVERY_FORM
@pytest.mark.parametrize("tokens", [1, 90])
@pytest.mark.parametrize(("kv_heads", "dims"), [((2, 3), (5, 8)), ((6, 2), (8, 8))])
def test_equals_its_definition_in_fp64(
    kv_heads: Any, dims: Any, tokens: int, form: str, kind: str
) -> None:
    states = formed(attention_states(2, 2, 6, tokens, dims, kv_heads=kv_heads), form)
    valid = masks(2, tokens)
    for key_mask, query_mask in ((None, None), (valid, None), (None, valid), (valid, valid)):
        options = {"key_mask": key_mask, "query_mask": query_mask, "temperature": 0.7}
        given, expected = (made(states, kind=kind, **options) for made in (op_of, exact))
        assert max(errors(given, expected)) < 1e-12


@EVERY_KIND
@EVERY_FORM
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, 7), (True, 7)])
def test_causal_and_windowed_rows(causal: bool, window: int | None, form: str, kind: str) -> None:
    states = formed(attention_states(1, 2, 4, 70, (5, 8), kv_heads=(2, 4)), form)
    mask = holes(2, 70)
    for key_mask, query_mask in ((None, None), (mask, None), (mask, mask)):
        options: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask}
        options |= {"causal": causal, "window": window, "kind": kind}
        assert max(errors(op_of(states, **options), exact(states, **options))) < 1e-12


def eager_maps(state: AttentionState, seen: Tensor) -> Tensor:
    """Attention maps `[batch, heads, tokens, tokens]` of transformers' own eager attention."""
    heads, kv_heads = state.query.shape[1], state.key.shape[1]
    module = SimpleNamespace(
        num_key_value_groups=heads // kv_heads, sinks=state.sinks, training=False
    )
    hidden = torch.zeros(seen.shape, dtype=state.query.dtype)
    hidden = hidden.masked_fill(~seen, torch.finfo(state.query.dtype).min)
    tensors = (module, state.query, state.key, state.key, hidden)
    made: tuple[Tensor, Tensor]
    if state.sinks is None:
        made = modeling_gemma2.eager_attention_forward(
            *tensors, scaling=state.scale, softcap=state.softcap
        )
    else:
        made = modeling_gpt_oss.eager_attention_forward(*tensors, scaling=state.scale)
    return made[1]


@pytest.mark.parametrize(
    ("form", "dtype", "tolerance"),
    [
        ("sinks", torch.float64, 1e-12),
        ("sinks", torch.float32, 1e-5),
        # Gemma 2 takes its softmax in fp32
        ("teacher capped", torch.float64, 1e-5),
        ("student capped", torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize("window", [None, 5])
def test_compares_the_maps_of_transformers(
    window: int | None, form: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Of GPT-OSS and Gemma 2, whose eager functions make them; a sink takes what keys leave."""
    states = formed(attention_states(1, 2, 4, 20, (6, 6), kv_heads=(2, 2), dtype=dtype), form)
    seen = visible_keys(states[0][0].query, None, True, window)
    maps = [eager_maps(side[0], seen) for side in states]
    for side, made in zip(states, maps, strict=True):
        given = log_probabilities(side[0], seen, 1.0).exp()[..., :20]
        torch.testing.assert_close(given, made, rtol=tolerance, atol=tolerance / 10)
    if FORMS[form][1]:
        assert max(made.detach().sum(-1).max().item() for made in maps) < 1.0
        maps = [torch.cat([made, 1 - made.sum(-1, keepdim=True)], -1) for made in maps]
    p, t = maps
    expected = {"mse": (p - t).square(), "kl": torch.where(t > 0, t * (t / p).log(), 0.0)}
    for kind, terms in expected.items():
        given = attention_divergence(*states, kind=kind, causal=True, window=window)
        wanted = terms.sum(-1).mean().to(given.dtype)
        torch.testing.assert_close(given[0], wanted, rtol=20 * tolerance, atol=0)


@EVERY_KIND
@EVERY_FORM
@pytest.mark.parametrize(
    ("dtype", "distance"),
    [
        (torch.float32, 1e-1),
        (torch.float32, 1e-4),
        (torch.bfloat16, 1e-2),
        (torch.float16, 1e-1),
    ],
)
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, distance: float, form: str, kind: str
) -> None:
    cap = None if form == "sinks" else 1.5
    states = near_states(distance, dtype, form, tokens=96, heads=4, cap=cap)
    given, expected, plain = (made(states, kind=kind) for made in (op_of, exact, defined))
    no_worse(given, expected, plain, dtype, sinks=FORMS[form][1])


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "cosine"])
@pytest.mark.parametrize(("form", "cap"), [("sinks", None), ("sinks", 50.0), ("sinks", 1.0)])
def test_losses_near_the_teacher_keep_digits_that_plain_pytorch_loses(
    form: str, cap: float | None, kind: str
) -> None:
    states = near_states(1e-3, torch.float32, form, tokens=96, cap=cap)
    given, expected, plain = (made(states, kind=kind) for made in (op_of, exact, defined))
    assert 4 * errors(given, expected)[0] <= errors(plain, expected)[0]


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_gradients_keep_their_digits_where_the_cap_is_reached(kind: str) -> None:
    """`1 - tanh^2` is a difference of two ones there."""
    student, teacher = attention_states(1, 1, 2, 40, (8, 8), dtype=torch.float32)
    student = [s._replace(scale=60.0, softcap=5.0) for s in student]
    states = student, [t._replace(softcap=5.0) for t in teacher]
    # scores of about 40, whose tanh is 1 but for its last bits
    for tensor, least in ((student[0].query, 0.5), (student[0].key, 0.15)):
        tensor.data.abs_().clamp_(max=1.0).mul_(least / 5).add_(least)
    given, expected, plain = (made(states, kind=kind) for made in (op_of, exact, defined))
    own, theirs = errors(given, expected)[1:], errors(plain, expected)[1:]
    assert max(own) < 2e-5
    assert all(8 * a <= b for a, b in zip(own, theirs, strict=True))


@EVERY_KIND
@EVERY_FORM
def test_student_equal_to_teacher(form: str, kind: str) -> None:
    """Loss 0 within rounding (cross-entropy: the teacher's entropy) and no gradient."""
    distant, teacher = formed(attention_states(1, 2, 4, 64, (16, 16), dtype=torch.float32), form)
    same = trained(cast(teacher, torch.float32))
    near_zero, far = op_of((same, teacher), kind=kind), op_of((distant, teacher), kind=kind)
    for own, scale in zip(near_zero[1:], far[1:], strict=True):
        assert own.norm() <= 1e-6 * scale.norm()
    if kind != "cross_entropy":
        assert 0.0 <= near_zero[0].item() <= 1e-6 * far[0].item()


@WITH_SINKS
@EVERY_KIND
def test_rows_that_do_not_count_add_nothing_to_any_gradient(form: str, kind: str) -> None:
    """Their keys and sinks would differ: their queries are 0 on both sides, their sinks are not."""
    student, teacher = formed(attention_states(2, 2, 4, 40, (6, 6)), form)
    rows = masks(2, 40)
    loss, *grads = op_of((student, teacher), kind=kind, query_mask=rows)
    hidden = ~rows[:, None, :, None].expand_as(grads[0])
    assert not grads[0][hidden].any()
    nothing = torch.zeros(2, 40, dtype=torch.bool)
    for name in ("key_mask", "query_mask"):
        for value in op_of((student, teacher), kind=kind, **{name: nothing}):
            assert torch.equal(value, torch.zeros_like(value))
    # a row that sees no key is no row, though it sees the sink
    keys = torch.arange(40).expand(2, -1) >= 13
    options: dict[str, Any] = {"kind": kind, "causal": True, "key_mask": keys}
    fewer = op_of((student, teacher), query_mask=keys, **options)
    assert max(errors(op_of((student, teacher), **options), fewer)) < 1e-14
    assert torch.isfinite(loss).all()


@EVERY_KIND
def test_padding_may_hold_anything(kind: str) -> None:
    states = formed(attention_states(1, 3, 4, 50, (6, 6), kv_heads=(2, 4)), "caps and sinks")
    valid = masks(3, 50)
    options: dict[str, Any] = {"key_mask": valid, "query_mask": valid, "kind": kind}
    clean = op_of(states, **options)
    for state in (*states[0], *states[1]):
        for tensor in state[:2]:
            tensor.data.masked_fill_(~valid[:, None, :, None], float("nan"))
    assert max(errors(op_of(states, **options), clean)) < 1e-14


@pytest.mark.parametrize("kv_heads", [(2, 4), (4, 1), (1, 1)])
def test_groups_of_heads_share_no_sink(kv_heads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group is one item's head or a few of them, where tensors are large."""
    states = formed(attention_states(2, 3, 4, 17, (6, 6), kv_heads=kv_heads), "sinks")
    expected = exact(states)
    for size in (1, 2000, 6000):
        monkeypatch.setattr(head_groups, "MOST_BYTES", size)
        assert max(errors(op_of(states), expected)) < 1e-12


def mixed() -> tuple[list[AttentionState], list[AttentionState]]:
    """Pairs of every form, one after the other, and a plain one; sinks of two dtypes."""
    plain = attention_states(1, 2, 4, 20, (6, 6), dtype=torch.float32)
    pairs = [formed(plain, form, seed) for seed in (4, 5) for form in FORMS]
    student = [pair[0][0] for pair in pairs] + plain[0]
    teacher = [pair[1][0] for pair in pairs] + plain[1]
    for index in (2, 7):
        sinks = student[index].sinks
        assert sinks is not None
        student[index] = student[index]._replace(
            sinks=sinks.detach().bfloat16().requires_grad_(), softcap=3.0 + index
        )
    return student, teacher


def test_pairs_may_differ() -> None:
    """Each loss and gradient stays with its own pair, and sinks keep their dtype."""
    states = mixed()
    student, teacher = states
    given = attention_divergence(*states)
    alone = [attention_divergence([s], [t]) for s, t in zip(*states, strict=True)]
    torch.testing.assert_close(given, torch.cat(alone), rtol=1e-6, atol=0)
    grads = op_of(states)[1:]
    wanted = exact(states)[1:]
    for own, expected, leaf in zip(grads, wanted, leaves_of(student), strict=True):
        assert own.dtype == leaf.dtype
        floor = 1e-5 if own.dtype == torch.float32 else torch.finfo(own.dtype).eps
        assert max(errors([own], [expected])) < floor
    assert teacher[0].sinks is None


@EVERY_KIND
@EVERY_FORM
def test_gradcheck(form: str, kind: str) -> None:
    student, teacher = formed(attention_states(2, 2, 2, 5, (3, 3), kv_heads=(1, 2)), form)
    valid = masks(2, 5)

    def loss(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        own = [
            s._replace(
                query=next(given),
                key=next(given),
                sinks=None if s.sinks is None else next(given),
            )
            for s in student
        ]
        options: dict[str, Any] = {"kind": kind, "temperature": 1.3}
        return attention_divergence(own, teacher, key_mask=valid, causal=True, **options)

    assert torch.autograd.gradcheck(loss, leaves_of(student), fast_mode=True)


def test_temperature_divides_capped_scores_and_sinks() -> None:
    student, teacher = formed(attention_states(1, 1, 2, 20, (4, 4)), "caps and sinks")
    cold = [
        [
            s._replace(scale=s.scale / 3, softcap=s.softcap / 3, sinks=s.sinks.detach() / 3)
            for s in side
            if s.softcap is not None and s.sinks is not None
        ]
        for side in (student, teacher)
    ]
    given = attention_divergence(student, teacher, temperature=3)
    torch.testing.assert_close(given, attention_divergence(*cold), rtol=1e-12, atol=0)


def test_limits() -> None:
    """A cap far above all scores is none, and neither is a sink far below them."""
    plain = attention_states(1, 1, 2, 20, (4, 4))
    expected = attention_divergence(*plain)
    high = [[s._replace(softcap=1e9) for s in side] for side in plain]
    torch.testing.assert_close(attention_divergence(*high), expected, rtol=1e-12, atol=0)
    low = torch.full((2,), -1e4, dtype=torch.float64)
    sunk = [[s._replace(sinks=low) for s in side] for side in plain]
    torch.testing.assert_close(attention_divergence(*sunk), expected, rtol=1e-12, atol=0)


def test_other_ops_read_neither() -> None:
    plain = attention_states(1, 1, 2, 20, (4, 4))
    plain = [[s._replace(value=s.key) for s in side] for side in plain]
    with_both = formed(plain, "caps and sinks")
    for op, options in (
        (attention_score_mse, {}),
        (relation_divergence, {"relation": "qk", "relation_heads": 2}),
        (relation_divergence, {"relation": "vv", "relation_heads": 4}),
    ):
        call: Callable[..., Tensor] = op
        definition = getattr(reference, call.__name__)
        for function in (call, definition):
            assert torch.equal(function(*with_both, **options), function(*plain, **options))
    # several teacher layers in one target have caps of their own
    student, teacher = plain
    layers = [teacher[0], teacher[0]._replace(softcap=2.0, sinks=torch.zeros(9))]
    whole = attention_score_mse(student, [[teacher[0]] * 2])
    assert torch.equal(attention_score_mse(student, [layers]), whole)


def test_memory_grows_with_tokens_not_with_their_square() -> None:
    def peak(tokens: int) -> int:
        plain = attention_states(1, 1, 2, tokens, (16, 32), dtype=torch.float32)
        states = formed(plain, "caps and sinks")
        leaves = leaves_of(states[0])
        return peak_bytes(
            lambda: torch.autograd.grad(attention_divergence(*states, kind="js").sum(), leaves)
        )

    assert peak(2048) < 2.2 * peak(1024) < 16e6


def test_four_fields_make_a_state() -> None:
    state = AttentionState(torch.zeros(1), torch.zeros(1), None, 0.5)
    assert (state.softcap, state.sinks) == (None, None)


def changed(side: int, **changes: Any) -> Callable[[], Tensor]:
    def call() -> Tensor:
        plain = attention_states(1, 2, 4, 6, (3, 5), dtype=torch.float32)
        states = formed(plain, "caps and sinks")
        states[side][0] = states[side][0]._replace(**changes)
        return attention_divergence(*states)

    return call


ERRORS: list[tuple[Callable[[], Any], Any, str]] = [
    (changed(0, softcap=0.0), ValueError, r"student\[0\].softcap is 0.0; .* 1e\+20, or None"),
    (changed(1, softcap=-50.0), ValueError, r"teacher\[0\].softcap is -50.0"),
    (changed(1, softcap=float("inf")), ValueError, "softcap is inf; expected a number from 1e-20"),
    (changed(0, softcap=1e39), ValueError, r"softcap is 1e\+39; expected a number from 1e-20"),
    (changed(1, softcap=1e-40), ValueError, "softcap is 1e-40; expected a number from 1e-20"),
    (changed(0, softcap="50"), TypeError, "softcap must be a float or None, got str"),
    (changed(0, softcap=True), TypeError, "softcap must be a float or None, got bool"),
    (
        changed(0, sinks=None),
        ValueError,
        r"pair 0: teacher\[0\].sinks is a tensor and student\[0\].sinks is None; .*or neither",
    ),
    (changed(1, sinks=None), ValueError, r"student\[0\].sinks is a tensor and teacher\[0\].sin"),
    (changed(0, sinks=torch.ones(3)), ValueError, "sinks has 3 entries for 4 query heads"),
    (changed(0, sinks=torch.ones(4, 1)), ValueError, r"sinks must be \[heads\], got shape \(4, 1"),
    (changed(0, sinks=torch.ones(4).int()), TypeError, "sinks is torch.int32; .*cast it"),
    (changed(0, sinks=[1.0] * 4), TypeError, r"sinks must be a tensor \[heads\], got list"),
    (changed(0, sinks=torch.ones(4, device="meta")), ValueError, "sinks is on meta"),
    (
        changed(1, sinks=torch.ones(4, requires_grad=True)),
        ValueError,
        r"teacher\[0\].sinks requires grad, .*detach",
    ),
]


@pytest.mark.parametrize(("run", "kind", "message"), ERRORS)
def test_errors(run: Callable[[], Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        run()


def test_sinks_alone_may_be_trained() -> None:
    student, teacher = formed(attention_states(1, 1, 2, 20, (4, 4)), "sinks")
    frozen = [s._replace(query=s.query.detach(), key=s.key.detach()) for s in student]
    assert student[0].sinks is not None
    given = loss_and_gradients(attention_divergence, [student[0].sinks], frozen, teacher)
    assert max(errors(given, [op_of((student, teacher))[i] for i in (0, 3)])) < 1e-14
