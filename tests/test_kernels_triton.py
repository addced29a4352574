"""The Triton kernels against the definitions: in the interpreter here, on a GPU where one is.

The interpreter is exact for fp16, fp32 and fp64 and wrong for bf16 products, so bf16 runs on a
GPU only.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within
from device_marks import no_wait
from fastkd_kernels import AttentionState, attention_score_mse, reference
from fastkd_kernels.attention_score_mse import triton_path
from kernel_cases import (
    Counted,
    attention_states,
    cast,
    defined_score_mse,
    errors,
    leaves_of,
    loss_and_gradients,
    masks,
    near,
    trained,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
interpreted = pytest.mark.skipif(GPU, reason="fp64 runs in the interpreter, without a GPU")

# kv_heads, dims, causal, algorithm with 4 heads
ATTENTION = [
    ((4, 4), (8, 8), False, "tiles"),
    ((4, 4), (5, 8), True, "tiles"),
    ((1, 2), (5, 20), False, "tiles"),
    ((2, 1), (8, 8), True, "tiles"),
    ((4, 4), (8, 8), False, "gram"),
    ((2, 4), (5, 20), False, "gram"),
    ((1, 2), (6, 6), False, "gram"),
    ((2, 1), (8, 8), True, "gram"),
    ((1, 2), (5, 20), True, "gram"),
]
EVERY_ALGORITHM = pytest.mark.parametrize(
    ("algorithm", "causal"), [("tiles", False), ("gram", False), ("gram", True)]
)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal Grams of one row block of fp32 or fp64, so that short inputs have several chunks."""
    monkeypatch.setattr(triton_path, "causal_chunk", lambda dims: 32)


def attention_both(states: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    student, teacher = states
    exact = trained(cast(student, torch.float64)), cast(teacher, torch.float64)
    defined = {name: value for name, value in options.items() if name != "algorithm"}
    given = loss_and_gradients(
        attention_score_mse, leaves_of(student), *states, backend="triton", **options
    )
    expected = loss_and_gradients(
        reference.attention_score_mse, leaves_of(exact[0]), *exact, **defined
    )
    return given, expected


@interpreted
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("kv_heads", "dims", "causal", "algorithm"), ATTENTION)
def test_attention_equals_its_definition_in_fp64(
    kv_heads: Any, dims: Any, causal: bool, algorithm: str, few: bool
) -> None:
    """One token, or two blocks of them; three chunks where one hands its sums to the next."""
    tokens = 1 if few else 70 if causal and algorithm == "gram" else 40
    states = attention_states(1 + few, 1 + few, 4, tokens, dims, kv_heads=kv_heads)
    mask = masks(2, 1) if few else torch.arange(tokens)[None] % 7 != 3
    options: dict[str, Any] = {"causal": causal, "algorithm": algorithm}
    # both means are the host's, and take turns
    reduction = ("valid", "tinybert")[sum(dims) % 2]
    for valid in (mask, None) if few else (mask,):
        given, expected = attention_both(
            states, key_mask=valid, query_mask=valid, reduction=reduction, **options
        )
        assert max(errors(given, expected)) < 1e-12


@EVERY_ALGORITHM
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
)
def test_attention_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype,
    distance: float,
    algorithm: str,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype.itemsize == 2:  # whose blocks are larger
        monkeypatch.setattr(triton_path, "causal_chunk", lambda dims: 128)
    tokens = 150 if causal else 48
    teacher = attention_states(1, 1, 2, tokens, (16, 16), device=DEVICE)[1]
    student = near([t._replace(query=t.query.cpu(), key=t.key.cpu()) for t in teacher], distance)
    student = [s._replace(query=s.query.to(DEVICE), key=s.key.to(DEVICE)) for s in student]
    states = trained(cast(student, dtype)), cast(teacher, dtype)
    options: dict[str, Any] = {"causal": causal, "gain": 2**10}
    given, _ = attention_both(states, algorithm=algorithm, **options)
    plain = loss_and_gradients(
        reference.attention_score_mse, leaves_of(states[0]), *states, **options
    )
    check_rounding(defined_score_mse(states, algorithm, **options), given, plain=plain)


@EVERY_ALGORITHM
def test_attention_dtypes_may_differ(algorithm: str, causal: bool) -> None:
    student, teacher = attention_states(1, 1, 2, 70, (8, 12), dtype=torch.float32, device=DEVICE)
    states = student, cast(teacher, torch.float16)
    given, _ = attention_both(states, algorithm=algorithm, causal=causal)
    chunk = triton_path.causal_chunk((8, 12))
    grams = {"chunk": chunk} if algorithm == "gram" else {}
    check_rounding(defined_score_mse(states, algorithm, causal=causal, **grams), given)


@EVERY_ALGORITHM
def test_attention_of_identical_models(algorithm: str, causal: bool) -> None:
    distant, teacher = attention_states(1, 1, 2, 70, (8, 8), dtype=torch.float32, device=DEVICE)
    same = trained(cast(teacher, torch.float32))
    options = {"algorithm": algorithm, "causal": causal, "backend": "triton"}
    zero = loss_and_gradients(attention_score_mse, leaves_of(same), same, teacher, **options)
    far = loss_and_gradients(attention_score_mse, leaves_of(distant), distant, teacher, **options)
    check_rounding(defined_score_mse((same, teacher), causal=causal), zero, scales=far)


@interpreted
@EVERY_ALGORITHM
def test_attention_gradcheck(algorithm: str, causal: bool) -> None:
    student, teacher = attention_states(1, 1, 2, 40 if causal else 4, (2, 2), kv_heads=(1, 2))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        own = [AttentionState(query, key, None, 0.7)]
        return attention_score_mse(
            own, teacher, algorithm=algorithm, causal=causal, backend="triton"
        )

    # along random directions: a call for each entry is slow
    assert torch.autograd.gradcheck(loss, leaves_of(student), fast_mode=True)


@EVERY_ALGORITHM
def test_attention_reads_any_strides_and_no_padding(algorithm: str, causal: bool) -> None:
    tokens = 70 if causal else 20
    student, teacher = attention_states(2, 2, 2, tokens, (6, 6), dtype=torch.float32, device=DEVICE)
    mask = masks(2, tokens).to(DEVICE)
    options: dict[str, Any] = {"algorithm": algorithm, "causal": causal, "backend": "triton"}
    options |= {"key_mask": mask, "query_mask": mask}
    clean = loss_and_gradients(attention_score_mse, leaves_of(student), student, teacher, **options)
    define = defined_score_mse((student, teacher), causal=causal, key_mask=mask, query_mask=mask)
    limits = bounds(define, clean)[1]
    for state in (*student, *teacher):
        for tensor in state[:2]:
            tensor.data.masked_fill_(~mask[:, None, :, None], float("nan"))
    spread = [
        s._replace(query=s.query.transpose(1, 2).contiguous().transpose(1, 2)) for s in student
    ]
    odd = [t._replace(key=t.key.mT.contiguous().mT) for t in teacher]
    dirty = loss_and_gradients(attention_score_mse, leaves_of(student), spread, odd, **options)
    check_within(dirty, clean, limits)


def test_nothing_valid_gives_zero() -> None:
    nothing = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    student, teacher = attention_states(1, 1, 2, 9, (4, 4), dtype=torch.float32, device=DEVICE)
    for algorithm in ("tiles", "gram"):
        options = {"key_mask": nothing, "algorithm": algorithm, "backend": "triton"}
        for value in loss_and_gradients(
            attention_score_mse, leaves_of(student), student, teacher, **options
        ):
            assert not value.any()


@EVERY_ALGORITHM
def test_launches_do_not_grow_with_pairs(
    algorithm: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    kernels = [
        "_tiles_fwd_kernel",
        "_tiles_bwd_dq_kernel",
        "_gram_kernel",
        "_gram_bwd_kernel",
        "_scan_kernel",
    ]
    for name in kernels:
        kernel = getattr(triton_path, name)
        monkeypatch.setattr(triton_path, name, Counted(kernel, seen, name))
    counts = []
    for pairs in (1, 3):
        seen.clear()
        states = attention_states(pairs, 1, 1, 70, (4, 4), dtype=torch.float32, device=DEVICE)
        options: dict[str, Any] = {"algorithm": algorithm, "causal": causal}
        attention_score_mse(*states, **options, backend="triton").sum().backward()
        counts.append(dict(seen))
    tiles = {"_tiles_fwd_kernel": 1, "_tiles_bwd_dq_kernel": 1}
    grams = {"_gram_kernel": 2, "_gram_bwd_kernel": 2}
    expected = tiles if algorithm == "tiles" else grams
    if algorithm == "gram" and causal:
        expected = {**tiles, **grams, "_scan_kernel": 2}
    assert counts == [expected, expected]


@needs_gpu
@EVERY_ALGORITHM
@pytest.mark.parametrize(("dims", "tokens"), [((26, 64), 300), ((64, 64), 300), ((26, 64), 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_at_bert_sizes(
    dtype: torch.dtype,
    dims: Any,
    tokens: int,
    algorithm: str,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_path, "causal_chunk", lambda dims: 128)
    states = attention_states(2, 2, 12, tokens, dims, dtype=dtype, device="cuda")
    mask = masks(2, tokens).cuda()
    given, expected = attention_both(
        states, key_mask=mask, query_mask=mask, algorithm=algorithm, causal=causal
    )
    # what tensor cores do to operands is not in the model of conditioning.py
    assert max(errors(given, expected)) <= 4 * torch.finfo(dtype).eps


@needs_gpu
def test_no_host_synchronisation() -> None:
    states = attention_states(2, 2, 4, 64, (16, 16), dtype=torch.float32, device="cuda")
    for waits in (nullcontext, no_wait):  # the first round compiles
        with waits():
            for options in (
                {"algorithm": "tiles"},
                {"algorithm": "gram"},
                {"algorithm": "gram", "causal": True},
            ):
                attention_score_mse(*states, **options).sum().backward()
