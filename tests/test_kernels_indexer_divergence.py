"""indexer_divergence against its definition and by hand: values, gradients, masks, memory."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within, distance, plain_loss_error
from device_marks import no_wait
from divergence_cases import holes
from fastkd_kernels import AttentionState, IndexerState, indexer_divergence, reference
from indexer_cases import IndexerCase, indexer_case, near_case, padded_with_nan
from kernel_cases import errors, masks, peak_bytes
from torch import Tensor

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
interpreted = pytest.mark.skipif(GPU, reason="fp64 runs in the interpreter, without a GPU")
EVERY_BACKEND = pytest.mark.parametrize("backend", ["torch", "triton"])
IN_FP64 = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


# index heads, (heads, kv_heads), dims, tokens, sinks, softcap, causal
SHAPES: list[tuple[int, tuple[int, int], tuple[int, int], int, bool, float | None, bool]] = [
    (3, (4, 2), (5, 8), 37, False, None, True),
    (1, (6, 1), (8, 3), 70, True, None, True),
    (2, (3, 3), (20, 4), 37, True, 2.0, True),
    (4, (2, 2), (1, 1), 35, False, 1.5, False),
    (2, (4, 4), (6, 6), 1, True, None, True),
    (9, (2, 1), (4, 40), 20, True, None, False),
]


@IN_FP64
@pytest.mark.parametrize(
    ("index_heads", "heads", "dims", "tokens", "sinks", "softcap", "causal"), SHAPES
)
def test_equals_its_definition_in_fp64(
    index_heads: int,
    heads: Any,
    dims: Any,
    tokens: int,
    sinks: bool,
    softcap: float | None,
    causal: bool,
    backend: str,
) -> None:
    options: dict[str, Any] = {"index_heads": index_heads, "heads": heads}
    pairs = 2 if backend == "torch" else 1
    case = indexer_case(pairs, 2, tokens, dims, sinks=sinks, softcap=softcap, **options)
    valid, gaps = masks(2, tokens), holes(2, tokens)
    both = [(None, None), (gaps, valid)]
    for key_mask, query_mask in both if backend == "triton" else [*both, (gaps, None)]:
        given, expected = case.both(
            key_mask=key_mask, query_mask=query_mask, causal=causal, backend=backend
        )
        assert max(errors(given, expected)) < 1e-12


def by_hand() -> tuple[list[float], list[float], list[float], list[float]]:
    """The last row of two tokens with two heads: scores of each, their sinks, index scores."""
    return [1.0, 3.0], [2.0, -1.0], [0.5, 2.5], [0.25, 1.5]


def kl_by_hand(target: list[float], scores: list[float]) -> float:
    total = sum(math.exp(score) for score in scores)
    return sum(t * math.log(t * total / math.exp(s)) for t, s in zip(target, scores, strict=True))


def states_by_hand() -> IndexerCase:
    """States that make the scores of `by_hand`; the first row sees one key and is worth 0."""
    first, second, sinks, scores = by_hand()
    last = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None]
    # the last query is 1 and the keys are the scores
    keys = torch.tensor([first, second], dtype=torch.float64)[None, ..., None]
    query = last.expand(1, 2, 2, 1)
    teacher = AttentionState(query, keys, None, 1.0, None, torch.tensor(sinks).double())
    # two index heads, of which the second meets negative products alone: relu makes them 0
    index_query = torch.stack([last, -last])[None]
    index_key = torch.tensor(scores, dtype=torch.float64)[None, :, None]
    weights = torch.tensor([[[1.0, 5.0], [1.0, 5.0]]], dtype=torch.float64)
    return IndexerCase([IndexerState(index_query, index_key, weights)], [teacher])


@pytest.mark.parametrize(
    "backend", ["definition", "torch", pytest.param("triton", marks=interpreted)]
)
def test_value_by_hand_and_two_known_mistakes(backend: str) -> None:
    first, second, sinks, scores = by_hand()
    parts = [
        [math.exp(s) / (sum(map(math.exp, head)) + math.exp(sink)) for s in head]
        for head, sink in zip((first, second), sinks, strict=True)
    ]
    summed = [sum(of_key) for of_key in zip(*parts, strict=True)]
    right = [value / sum(summed) for value in summed]

    def loss(case: IndexerCase) -> float:
        op, options = indexer_divergence, {"backend": backend}
        if backend == "definition":
            op, options = reference.indexer_divergence, {}
        # a mean over two rows
        return 2 * float(op(case.student, case.teacher, **options))

    case = states_by_hand()
    value = kl_by_hand(right, scores)
    assert loss(case) == pytest.approx(value, rel=1e-12)
    # one wrong version leaves the sinks out of the denominators: heads weigh the same
    plain = [[math.exp(s) / sum(map(math.exp, head)) for s in head] for head in (first, second)]
    unsunk = [sum(of_key) / 2 for of_key in zip(*plain, strict=True)]
    assert abs(kl_by_hand(unsunk, scores) - value) > 0.05
    without = [case.teacher[0]._replace(sinks=None)]
    assert loss(case._replace(teacher=without)) == pytest.approx(kl_by_hand(unsunk, scores))
    # another takes the softmax of logits that are averaged over heads
    averaged = [math.exp((a + b) / 2) for a, b in zip(first, second, strict=True)]
    of_logits = [value / sum(averaged) for value in averaged]
    assert abs(kl_by_hand(of_logits, scores) - value) > 0.05
    assert abs(kl_by_hand(of_logits, scores) - kl_by_hand(unsunk, scores)) > 0.05


@EVERY_BACKEND
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, distance: float, backend: str
) -> None:
    """At most twice the error of plain PyTorch, or what rounding does to the definition."""
    if backend == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter takes no bf16")
    case = near_case(distance, dtype, tokens=40, device=device_of(backend))
    given = case.run(backend=backend, gain=2**10)
    check_rounding(case.exactly(gain=2**10), given, plain=case.defined(gain=2**10))


@EVERY_BACKEND
def test_losses_near_the_teacher_keep_digits_that_plain_pytorch_loses(backend: str) -> None:
    case = near_case(1e-3, torch.float32, tokens=40, device=device_of(backend))
    given, expected = case.both(backend=backend, causal=False)
    plain = plain_loss_error(case.exactly(causal=False))
    assert 4 * distance(given[0], expected[0]) <= plain


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("dtype", "tokens", "sinks"),
    [(torch.float32, 40, False), (torch.float32, 40, True), (torch.float16, 70, True)],
)
def test_random_models_in_low_precision(
    dtype: torch.dtype, tokens: int, sinks: bool, backend: str
) -> None:
    case = indexer_case(1, 1, tokens, (8, 8), sinks=sinks, dtype=dtype, device=device_of(backend))
    given = case.run(backend=backend, gain=2**10)
    check_rounding(case.exactly(gain=2**10), given)


# numpy, which interprets, sees what is masked away
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@EVERY_BACKEND
def test_models_far_apart(backend: str) -> None:
    """Scores of hundreds, where probabilities underflow: finite, and equal to the definition."""
    case = indexer_case(2, 1, 40, (8, 8), dtype=torch.float32, device=device_of(backend))
    case = IndexerCase(case.student, [s._replace(scale=30.0) for s in case.teacher])
    case = IndexerCase(
        [s._replace(weights=(60 * s.weights.detach()).requires_grad_()) for s in case.student],
        case.teacher,
    )
    check_rounding(case.exactly(), case.run(backend=backend))


@EVERY_BACKEND
@pytest.mark.parametrize("size", [120.0, -120.0, 1e4])
def test_sinks_that_take_everything_or_nothing(size: float, backend: str) -> None:
    """What is left of the heads is still compared: their shares are far below the least number."""
    case = indexer_case(
        1, 2, 35, (8, 8), sinks=True, dtype=torch.float32, device=device_of(backend)
    )
    teacher = [s._replace(sinks=s.sinks + size) for s in case.teacher if s.sinks is not None]
    case = IndexerCase(case.student, teacher)
    given, expected = case.both(backend=backend)
    # sinks of a size are rounded by its last bit, and shares with them
    assert max(errors(given, expected)) < 1e-5 + 1e-7 * abs(size)


@EVERY_BACKEND
def test_indexer_equal_to_the_attention(backend: str) -> None:
    device = device_of(backend)
    zero = near_case(0.0, torch.float32, tokens=40, device=device).run(backend=backend)
    case = near_case(0.0, torch.float32, tokens=40, device=device)
    far = near_case(0.5, torch.float32, tokens=40, device=device).run(backend=backend)
    check_rounding(case.exactly(), zero, scales=far)
    assert min(zero[0].tolist()) >= 0.0


@EVERY_BACKEND
def test_nothing_valid_gives_zero(backend: str) -> None:
    device = device_of(backend)
    case = indexer_case(2, 2, 9, (4, 4), sinks=True, dtype=torch.float32, device=device)
    nothing = torch.zeros(2, 9, dtype=torch.bool, device=device)
    for name in ("key_mask", "query_mask"):
        for value in case.run(backend=backend, **{name: nothing}):
            assert torch.equal(value, torch.zeros_like(value))


@EVERY_BACKEND
def test_padding_may_hold_anything(backend: str) -> None:
    """NaN at padded tokens reaches neither the loss nor a gradient."""
    device = device_of(backend)
    case = indexer_case(1, 3, 40, (6, 6), sinks=True, dtype=torch.float32, device=device)
    valid = masks(3, 40).to(device)
    options: dict[str, Any] = {"key_mask": valid, "query_mask": valid}
    clean = case.run(backend=backend, **options)
    limits = bounds(case.exactly(**options), clean)[1]
    dirty = padded_with_nan(case, valid).run(backend=backend, **options)
    check_within(dirty, clean, limits)
    for gradient, axis in zip(dirty[1:], (2, 1, 1), strict=True):
        rows = gradient.movedim(axis, 1)
        assert torch.count_nonzero(rows[~valid]) == 0


@EVERY_BACKEND
def test_rows_before_the_first_valid_key_do_not_count(backend: str) -> None:
    device = device_of(backend)
    case = indexer_case(1, 1, 20, (6, 6), dtype=torch.float32, device=device)
    late = torch.arange(20, device=device)[None] >= 7
    both = [case.run(backend=backend, key_mask=late, query_mask=mask) for mask in (None, late)]
    assert all(map(torch.equal, *both))
    cut = IndexerCase(
        [IndexerState(s.query[:, :, 7:], s.key[:, 7:], s.weights[:, 7:]) for s in case.student],
        [s._replace(query=s.query[:, :, 7:], key=s.key[:, :, 7:]) for s in case.teacher],
    ).mapped(torch.clone)
    assert max(errors(both[0][:1], cut.run(backend=backend)[:1])) < 1e-6


@EVERY_BACKEND
def test_reads_any_strides_and_keys_of_both_forms(backend: str) -> None:
    device = device_of(backend)
    case = indexer_case(2, 2, 33, (6, 6), heads=(4, 1), dtype=torch.float32, device=device)
    clean = case.run(backend=backend)
    limits = bounds(case.exactly(), clean)[1]
    spread = [
        IndexerState(
            s.query.transpose(1, 2).contiguous().transpose(1, 2),
            s.key.mT.contiguous().mT[:, None],
            s.weights.mT.contiguous().mT,
        )
        for s in case.student
    ]
    wide = [
        s._replace(query=s.query.mT.contiguous().mT, key=s.key.expand(-1, 4, -1, -1))
        for s in case.teacher
    ]
    loss = indexer_divergence(spread, wide, backend=backend)
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss)
    given = [loss.detach(), *torch.autograd.grad(loss, case.leaves, upstream)]
    check_within(given, clean, limits)


@EVERY_BACKEND
def test_pairs_and_dtypes_may_differ(backend: str) -> None:
    device = device_of(backend)
    first = indexer_case(2, 2, 20, (6, 6), dtype=torch.float32, device=device)
    second = indexer_case(
        1,
        2,
        20,
        (3, 8),
        index_heads=2,
        heads=(3, 3),
        seed=7,
        sinks=True,
        softcap=2.0,
        dtype=torch.float32,
        device=device,
    )
    student = [first.student[0], second.student[0], first.student[1]]
    half = torch.float16
    student[1] = IndexerState(
        *(t.detach().to(half).requires_grad_() for t in student[1][:2]), student[1].weights
    )
    teacher = [first.teacher[0], second.teacher[0], first.teacher[1]]
    teacher = [s._replace(query=s.query.to(half), key=s.key.to(half)) for s in teacher]
    case = IndexerCase(student, teacher)
    given = case.run(backend=backend)
    assert given[0].dtype == torch.float32
    assert [value.dtype for value in given[4:7]] == [half, half, torch.float32]
    check_rounding(case.exactly(), given, operands=half)


@pytest.mark.parametrize(
    "backend", ["definition", "torch", pytest.param("triton", marks=interpreted)]
)
def test_gradcheck(backend: str) -> None:
    case = indexer_case(1, 1, 4, (2, 2), index_heads=2, heads=(2, 1), sinks=True)
    valid = torch.tensor([[True, False, True, True]])

    def loss(*tensors: Tensor) -> Tensor:
        student = [IndexerState(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        if backend == "definition":
            return reference.indexer_divergence(student, case.teacher, key_mask=valid)
        return indexer_divergence(student, case.teacher, key_mask=valid, backend=backend)

    assert torch.autograd.gradcheck(loss, case.leaves, fast_mode=backend == "triton")


def test_does_not_depend_on_the_cut_of_the_batch() -> None:
    case = indexer_case(1, 4, 60, (6, 6), sinks=True)
    valid = masks(4, 60)

    def sums(rows: slice, tokens: int) -> Tensor:
        """Loss times what it divides by, for a part of the batch padded to `tokens`."""
        mask = valid[rows, :tokens]
        student = [
            IndexerState(s.query[rows, :, :tokens], s.key[rows, :tokens], s.weights[rows, :tokens])
            for s in case.student
        ]
        teacher = [
            s._replace(query=s.query[rows, :, :tokens], key=s.key[rows, :, :tokens])
            for s in case.teacher
        ]
        return indexer_divergence(student, teacher, key_mask=mask, query_mask=mask) * mask.sum()

    cut = sums(slice(0, 1), 60) + sums(slice(1, 4), int(valid[1:].sum(1).max()))
    torch.testing.assert_close(cut, sums(slice(0, 4), 60), rtol=1e-12, atol=0)


def test_teacher_gets_nothing_and_inputs_stay() -> None:
    case = indexer_case(1, 1, 20, (4, 4), sinks=True)
    tensors = [*case.leaves, case.teacher[0].query, case.teacher[0].key]
    before = [tensor.detach().clone() for tensor in tensors]
    indexer_divergence(case.student, case.teacher).sum().backward()
    assert all(map(torch.equal, before, tensors))
    assert case.student[0].weights.grad is not None
    assert case.teacher[0].query.grad is None


def test_memory_grows_with_tokens_not_with_their_square() -> None:
    def peak(tokens: int) -> int:
        case = indexer_case(1, 1, tokens, (16, 16), dtype=torch.float32)
        return peak_bytes(case.run)

    # blocks of scores, then queries, keys, and their gradients in fp32
    assert peak(2048) < 2.2 * peak(1024) < 16e6


@needs_gpu
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (128, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_at_real_sizes(dtype: torch.dtype, dims: Any) -> None:
    case = indexer_case(
        2, 2, 300, dims, index_heads=16, heads=(8, 2), sinks=True, dtype=dtype, device="cuda"
    )
    given, expected = case.both(key_mask=holes(2, 300).cuda(), backend="triton")
    # what tensor cores do to operands is not in the model of conditioning.py
    assert max(errors(given, expected)) <= 8 * torch.finfo(dtype).eps


@needs_gpu
def test_no_host_synchronisation() -> None:
    case = indexer_case(2, 2, 64, (16, 16), sinks=True, dtype=torch.float32, device="cuda")
    mask = holes(2, 64).cuda()
    for waits in (nullcontext, no_wait):  # the first round compiles
        with waits():
            indexer_divergence(case.student, case.teacher, key_mask=mask).sum().backward()
