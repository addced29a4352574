"""attention_score_mse against its definition: values, gradients, memory, time."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within
from fastkd_kernels import AttentionState, attention_score_mse, reference
from fastkd_kernels.attention_score_mse.op import choose_algorithm
from fastkd_kernels.attention_score_mse.torch_path import CHUNK
from kernel_cases import (
    attention_states,
    cast,
    defined_score_mse,
    errors,
    leaves_of,
    loss_and_gradients,
    masks,
    near,
    peak_bytes,
    trained,
)
from torch import Tensor

BOTH = pytest.mark.parametrize("algorithm", ["tiles", "gram"])
# (kv_heads, dims) of student, teacher with 6 heads
HEADS = [
    ((6, 6), (8, 8)),
    ((6, 6), (5, 8)),
    ((2, 3), (8, 8)),
    ((3, 6), (5, 8)),
    ((1, 2), (4, 4)),
]


def both(states: Any, **options: Any) -> tuple[list[Tensor], ...]:
    """Losses and gradients of the op and of its definition on fp64 copies."""
    student, teacher = states
    exact = trained(cast(student, torch.float64)), cast(teacher, torch.float64)
    defined = {k: v for k, v in options.items() if k not in ("algorithm", "backend")}
    given = loss_and_gradients(attention_score_mse, leaves_of(student), *states, **options)
    expected = loss_and_gradients(
        reference.attention_score_mse, leaves_of(exact[0]), *exact, **defined
    )
    return given, expected


@BOTH
@pytest.mark.parametrize("reduction", ["valid", "tinybert"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 37, CHUNK + 3])
@pytest.mark.parametrize(("kv_heads", "dims"), HEADS)
def test_equals_its_definition_in_fp64(
    kv_heads: Any, dims: Any, tokens: int, causal: bool, reduction: str, algorithm: str
) -> None:
    states = attention_states(2, 3, 6, tokens, dims, kv_heads=kv_heads)
    valid = masks(3, tokens)
    options = {"causal": causal, "reduction": reduction, "algorithm": algorithm}
    for key_mask, query_mask in ((None, None), (valid, None), (None, valid), (valid, valid)):
        given, expected = both(states, key_mask=key_mask, query_mask=query_mask, **options)
        assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize(("kv_heads", "dims"), HEADS)
def test_causal_chunks_add_up(kv_heads: Any, dims: Any) -> None:
    """Four chunks, the last one short: what they give each other comes once."""
    tokens = 3 * CHUNK + 20
    states = attention_states(1, 2, 6, tokens, dims, kv_heads=kv_heads)
    for valid in (None, masks(2, tokens)):
        given, expected = both(
            states, key_mask=valid, query_mask=valid, causal=True, algorithm="gram"
        )
        assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize(
    ("tokens", "reduction"),
    [*((tokens, "valid") for tokens in (37, 128, 512, 1024)), (128, "tinybert"), (512, "tinybert")],
)
def test_equals_its_definition_in_fp32_at_bert_sizes(tokens: int, reduction: str) -> None:
    batch = heads = 2 if tokens < 1024 else 1
    states = attention_states(1, batch, heads, tokens, (26, 64), dtype=torch.float32)
    valid = masks(batch, tokens) if batch > 1 else torch.arange(tokens)[None] < tokens - 300
    for algorithm in ("tiles", "gram"):
        options: dict[str, Any] = {"key_mask": valid, "query_mask": valid, "reduction": reduction}
        given, _ = both(states, algorithm=algorithm, **options)
        check_rounding(defined_score_mse(states, algorithm, **options), given)


@BOTH
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(16, 16), (8, 16)])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, distance: float, dims: tuple[int, int], causal: bool, algorithm: str
) -> None:
    """At most twice the error of plain PyTorch, or what rounding does to the definition; to Grams
    of both models where these cancel (head sizes that differ), whose loss has the digits of the
    mean squared score instead of its own."""
    teacher = attention_states(1, 2, 2, 96, dims)[1]
    if dims[0] == dims[1]:
        student = near(teacher, distance)
    else:
        # the same scores from fewer columns: half of the teacher's are zero
        for state in teacher:
            state.query[..., dims[0] :] = 0
            state.key[..., dims[0] :] = 0
        student = [
            t._replace(query=t.query[..., : dims[0]], key=t.key[..., : dims[0]]) for t in teacher
        ]
        student = near(student, distance)
    states = trained(cast(student, dtype)), cast(teacher, dtype)
    options: dict[str, Any] = {"causal": causal, "gain": 2**10}
    given, expected = both(states, algorithm=algorithm, **options)
    plain = loss_and_gradients(
        reference.attention_score_mse, leaves_of(states[0]), *states, **options
    )
    # all 96 tokens are one chunk of the causal form, which is made of tiles
    cancels = dims[0] != dims[1] and algorithm == "gram" and not causal
    scales = None
    if cancels:
        scales = [reference.attention_scores(teacher[0]).square().mean(), *expected[1:]]
    define = defined_score_mse(states, algorithm if cancels else "tiles", **options)
    # Grams that cancel are never rounded to halves
    operands = torch.float32 if cancels else None
    check_rounding(define, given, plain=plain, scales=scales, operands=operands)


def test_student_and_teacher_dtypes_may_differ() -> None:
    student, teacher = attention_states(2, 2, 4, 40, (8, 12), dtype=torch.float32)
    teacher = cast(teacher, torch.bfloat16)
    states = student, teacher
    given, _ = both(states, algorithm="tiles")
    check_rounding(defined_score_mse(states), given)
    assert given[0].dtype == torch.float32
    given, _ = both(states, algorithm="gram")
    check_rounding(defined_score_mse(states, "gram"), given)
    assert given[1].dtype == torch.float32


@BOTH
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(16, 16), (8, 16)])
def test_identical_models_have_no_loss(dims: Any, causal: bool, algorithm: str) -> None:
    """Loss and gradients are what rounding leaves of those that a distant student gets."""
    distant, teacher = attention_states(1, 2, 3, 200, dims, dtype=torch.float32)
    same = [
        t._replace(query=t.query[..., : dims[0]].clone(), key=t.key[..., : dims[0]].clone())
        for t in teacher
    ]
    for state in teacher:
        state.query[..., dims[0] :] = 0
        state.key[..., dims[0] :] = 0
    same = [t._replace(scale=teacher[0].scale) for t in trained(same)]
    options = {"causal": causal, "algorithm": algorithm}
    near_zero = loss_and_gradients(attention_score_mse, leaves_of(same), same, teacher, **options)
    far = loss_and_gradients(attention_score_mse, leaves_of(distant), distant, teacher, **options)
    define = defined_score_mse((same, teacher), algorithm, causal=causal)
    check_rounding(define, near_zero, scales=far)
    assert near_zero[0].item() >= 0.0


@BOTH
@pytest.mark.parametrize("reduction", ["valid", "tinybert"])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_valid_gives_zero(causal: bool, reduction: str, algorithm: str) -> None:
    student, teacher = attention_states(2, 2, 3, 9, (4, 4), dtype=torch.float32)
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    options = {"causal": causal, "reduction": reduction, "algorithm": algorithm}
    for value in loss_and_gradients(
        attention_score_mse, leaves_of(student), student, teacher, key_mask=nothing, **options
    ):
        assert torch.equal(value, torch.zeros_like(value))


@BOTH
@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_anything(causal: bool, algorithm: str) -> None:
    """NaN at padded tokens reaches neither the loss nor a gradient."""
    student, teacher = attention_states(1, 3, 4, 50, (6, 6), kv_heads=(2, 4))
    valid = masks(3, 50)
    options = {"key_mask": valid, "query_mask": valid, "causal": causal, "algorithm": algorithm}
    clean = loss_and_gradients(attention_score_mse, leaves_of(student), student, teacher, **options)
    limits = bounds(defined_score_mse((student, teacher), **options), clean)[1]
    for state in (*student, *teacher):
        for tensor in (state.query, state.key):
            tensor.data.masked_fill_(~valid[:, None, :, None], float("nan"))
    dirty = loss_and_gradients(attention_score_mse, leaves_of(student), student, teacher, **options)
    check_within(dirty, clean, limits)


@BOTH
@pytest.mark.parametrize("causal", [False, True])
def test_does_not_depend_on_padding_or_on_the_cut(causal: bool, algorithm: str) -> None:
    student, teacher = attention_states(1, 4, 3, 60, (6, 6))
    valid = masks(4, 60)
    options: dict[str, Any] = {"causal": causal, "algorithm": algorithm}

    def sums(rows: slice, tokens: int) -> Tensor:
        """Loss times what it divides by, for a part of the batch padded to `tokens`."""
        mask = valid[rows, :tokens]
        part = [
            [s._replace(query=s.query[rows, :, :tokens], key=s.key[rows, :, :tokens]) for s in side]
            for side in (student, teacher)
        ]
        count = mask.long().cumsum(1) * mask if causal else mask.sum(1, keepdim=True) * mask
        loss = attention_score_mse(*part, key_mask=mask, query_mask=mask, **options)
        return loss * count.sum() * 3

    whole = sums(slice(0, 4), 60)
    longest = int(valid[1:].sum(1).max())
    cut = sums(slice(0, 1), 60) + sums(slice(1, 4), longest)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=0)


@BOTH
def test_reads_any_strides(algorithm: str) -> None:
    student, teacher = attention_states(2, 2, 4, 33, (6, 6))
    expected = both((student, teacher), algorithm=algorithm)[1]
    spread = [s._replace(query=_spread(s.query), key=_spread(s.key)) for s in student]
    target = [s._replace(query=_spread(s.query), key=s.key.mT.contiguous().mT) for s in teacher]
    given = loss_and_gradients(
        attention_score_mse, leaves_of(spread), spread, target, algorithm=algorithm
    )
    assert max(errors(given, expected)) < 1e-12


def _spread(value: Tensor) -> Tensor:
    """The same values laid out `[batch, tokens, heads, dim]`, as models hand them over."""
    laid = value.detach().transpose(1, 2).contiguous().transpose(1, 2)
    return laid.requires_grad_(value.requires_grad)


@BOTH
def test_reads_expanded_key_heads(algorithm: str) -> None:
    """Keys expanded over heads (stride 0) give what separate GQA keys give."""
    student, teacher = attention_states(1, 2, 4, 20, (6, 6), kv_heads=(1, 1))
    wide = [s._replace(key=s.key.expand(-1, 4, -1, -1)) for s in student]
    target = [s._replace(key=s.key.expand(-1, 4, -1, -1)) for s in teacher]
    expected = both((student, teacher), algorithm=algorithm)[1]
    given = loss_and_gradients(
        attention_score_mse, leaves_of(student), wide, target, algorithm=algorithm
    )
    assert max(errors(given, expected)) < 1e-12


def test_pairs_may_differ_in_shape() -> None:
    first = attention_states(2, 2, 4, 20, (6, 6))
    second = attention_states(1, 2, 4, 20, (3, 8), seed=7)
    student = [first[0][0], second[0][0], first[0][1]]
    teacher = [first[1][0], second[1][0], first[1][1]]
    given, expected = both((student, teacher))
    assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize("reduction", ["valid", "tinybert"])
def test_pairs_may_differ_in_their_heads(reduction: Any) -> None:
    """Each is averaged over its own, by the op and by its definition."""
    valid = masks(2, 5)
    options: dict[str, Any] = {"key_mask": valid, "query_mask": valid, "reduction": reduction}
    sides = zip(*(attention_states(1, 2, heads, 5, (3, 4)) for heads in (1, 3, 2)), strict=True)
    student, teacher = ([states[0] for states in side] for side in sides)
    rows = valid if reduction == "valid" else torch.ones_like(valid)
    expected = []
    for state, target in zip(student, teacher, strict=True):
        given, wanted = (s.scale * s.query @ s.key.mT for s in (state, target))
        counted = (rows[:, None, :, None] & valid[:, None, None, :]).expand_as(given)
        squares = (given - wanted)[counted].square()
        expected.append(squares.mean() if reduction == "valid" else squares.sum() / given.numel())
    for op in (reference.attention_score_mse, attention_score_mse):
        torch.testing.assert_close(op(student, teacher, **options), torch.stack(expected))


@BOTH
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool, algorithm: str) -> None:
    student, teacher = attention_states(1, 2, 2, 4, (2, 2), kv_heads=(1, 2))
    valid = masks(2, 4)

    def loss(*tensors: Tensor) -> Tensor:
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        own = [AttentionState(query, key, None, 0.7) for query, key in pairs]
        return attention_score_mse(
            own, teacher, key_mask=valid, query_mask=valid, causal=causal, algorithm=algorithm
        )

    assert torch.autograd.gradcheck(loss, leaves_of(student))


@BOTH
def test_inputs_stay_as_they_are_and_teacher_gets_nothing(algorithm: str) -> None:
    student, teacher = attention_states(1, 1, 2, 20, (4, 4))
    before = [tensor.clone() for state in (*student, *teacher) for tensor in state[:2]]
    attention_score_mse(student, teacher, algorithm=algorithm).sum().backward()
    after = [tensor for state in (*student, *teacher) for tensor in state[:2]]
    assert all(map(torch.equal, before, after))
    assert student[0].query.grad is not None
    assert teacher[0].query.grad is None


def test_official_tinybert_loss() -> None:
    """The lines of the official code: an additive -10000 mask, then entries <= -100 set to 0."""
    student, teacher = attention_states(1, 3, 4, 24, (6, 8), dtype=torch.float32)
    valid = masks(3, 24)
    additive = (1.0 - valid[:, None, None, :].double()) * -10000.0
    options: dict[str, Any] = {"key_mask": valid, "query_mask": valid, "reduction": "tinybert"}
    exact = [cast(side, torch.float64)[0] for side in (student, teacher)]
    maps = [reference.attention_scores(state) + additive for state in exact]
    own, target = (torch.where(m <= -1e2, torch.zeros_like(m), m) for m in maps)
    expected = torch.nn.functional.mse_loss(own, target)
    given, defined = both((student, teacher), **options)
    torch.testing.assert_close(defined[0][0], expected, rtol=1e-12, atol=0)
    check_rounding(defined_score_mse((student, teacher), "gram", **options), given)


def test_choice_of_algorithm() -> None:
    choose: Callable[..., str] = choose_algorithm
    assert choose(128, 26, 64, causal=False, backend="torch") == "gram"
    assert choose(128, 64, 64, causal=False, backend="torch") == "tiles"
    assert choose(2048, 64, 64, causal=False, backend="torch") == "gram"
    assert choose(256, 64, 64, causal=True, backend="torch") == "tiles"
    assert choose(2048, 128, 128, causal=True, backend="torch") == "gram"
    assert choose(512, 26, 64, causal=False, backend="triton") == "tiles"
    assert choose(2048, 26, 64, causal=False, backend="triton") == "gram"
    assert choose(2048, 128, 128, causal=True, backend="triton") == "tiles"
    assert choose(4096, 128, 128, causal=True, backend="triton") == "gram"
    # the tiles would not take it
    assert choose(16, 300, 64, causal=False, backend="triton") == "gram"


@pytest.mark.parametrize("dims", [(26, 64), (64, 64)])
def test_linear_time_and_memory_at_2048_tokens(dims: tuple[int, int]) -> None:
    """At least 20 times faster than the definition in paired runs, and under 13 MB of memory (both
    gradients twice, undivided and divided), where the definition takes over 300 MB."""
    student, teacher = attention_states(1, 1, 6, 2048, dims, dtype=torch.float32)
    leaves = leaves_of(student)

    def step(op: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(op(student, teacher).sum(), leaves)

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    fast, direct = step(attention_score_mse), step(reference.attention_score_mse)
    assert peak_bytes(fast) < 13e6
    assert peak_bytes(direct) > 300e6
    ratios: list[float] = []
    # the median of three: two that agree are enough
    while len(ratios) < 3 and sum(ratio >= 20.0 for ratio in ratios) < 2:
        ratios.append(seconds(direct) / statistics.median(seconds(fast) for _ in range(3)))
    assert sum(ratio >= 20.0 for ratio in ratios) == 2, ratios
