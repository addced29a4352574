"""The Triton kernels against the definitions: in the interpreter here, on a GPU where one is.

The interpreter is exact for fp16, fp32 and fp64 and wrong for bf16 products, so bf16 runs on a
GPU only.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastkd_kernels import AttentionState, attention_score_mse, reference
from kernel_cases import (
    Counted,
    attention_states,
    cast,
    errors,
    fresh_tensors_are_nan,
    leaves_of,
    loss_and_gradients,
    masks,
    near,
    trained,
)
from torch import Tensor

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
]


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    with fresh_tensors_are_nan():
        yield


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
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize(("kv_heads", "dims", "causal", "algorithm"), ATTENTION)
def test_attention_equals_its_definition_in_fp64(
    kv_heads: Any, dims: Any, causal: bool, algorithm: str, tokens: int
) -> None:
    batch = 2 if tokens == 1 else 1
    states = attention_states(2, batch, 4, tokens, dims, kv_heads=kv_heads)
    mask = masks(batch, tokens) if tokens < 70 else torch.arange(tokens)[None] % 7 != 3
    for reduction, key_mask, query_mask in (
        ("valid", mask, mask),
        ("tinybert", mask, mask),
        ("valid", None, None),
    ):
        given, expected = attention_both(
            states,
            key_mask=key_mask,
            query_mask=query_mask,
            causal=causal,
            reduction=reduction,
            algorithm=algorithm,
        )
        assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
)
def test_attention_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, distance: float, algorithm: str
) -> None:
    teacher = attention_states(1, 1, 2, 48, (16, 16), device=DEVICE)[1]
    student = near([t._replace(query=t.query.cpu(), key=t.key.cpu()) for t in teacher], distance)
    student = [s._replace(query=s.query.to(DEVICE), key=s.key.to(DEVICE)) for s in student]
    states = trained(cast(student, dtype)), cast(teacher, dtype)
    given, expected = attention_both(states, algorithm=algorithm)
    plain = loss_and_gradients(reference.attention_score_mse, leaves_of(states[0]), *states)
    floors = [8 * torch.finfo(torch.float32).eps, *[torch.finfo(dtype).eps] * 2]
    for own, theirs, floor in zip(
        errors(given, expected), errors(plain, expected), floors, strict=True
    ):
        assert own <= max(2 * theirs, floor)


@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
def test_attention_dtypes_may_differ(algorithm: str) -> None:
    student, teacher = attention_states(1, 1, 2, 33, (8, 12), dtype=torch.float32, device=DEVICE)
    states = student, cast(teacher, torch.float16)
    given, expected = attention_both(states, algorithm=algorithm)
    assert max(errors(given, expected)) < 1e-5


@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
def test_attention_of_identical_models(algorithm: str) -> None:
    distant, teacher = attention_states(1, 1, 2, 40, (8, 8), dtype=torch.float32, device=DEVICE)
    same = trained(cast(teacher, torch.float32))
    options = {"algorithm": algorithm, "backend": "triton"}
    zero = loss_and_gradients(attention_score_mse, leaves_of(same), same, teacher, **options)
    far = loss_and_gradients(attention_score_mse, leaves_of(distant), distant, teacher, **options)
    for own, scale in zip(zero, far, strict=True):
        assert own.norm() <= 1e-6 * scale.norm()


@interpreted
@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
def test_attention_gradcheck(algorithm: str) -> None:
    student, teacher = attention_states(1, 1, 2, 4, (2, 2), kv_heads=(1, 2))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        own = [AttentionState(query, key, None, 0.7)]
        return attention_score_mse(own, teacher, algorithm=algorithm, backend="triton")

    assert torch.autograd.gradcheck(loss, leaves_of(student))


@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
def test_attention_reads_any_strides_and_no_padding(algorithm: str) -> None:
    student, teacher = attention_states(2, 2, 2, 20, (6, 6), dtype=torch.float32, device=DEVICE)
    mask = masks(2, 20).to(DEVICE)
    options = {"key_mask": mask, "query_mask": mask, "algorithm": algorithm, "backend": "triton"}
    clean = loss_and_gradients(attention_score_mse, leaves_of(student), student, teacher, **options)
    for state in (*student, *teacher):
        for tensor in state[:2]:
            tensor.data.masked_fill_(~mask[:, None, :, None], float("nan"))
    spread = [
        s._replace(query=s.query.transpose(1, 2).contiguous().transpose(1, 2)) for s in student
    ]
    odd = [t._replace(key=t.key.mT.contiguous().mT) for t in teacher]
    dirty = loss_and_gradients(attention_score_mse, leaves_of(student), spread, odd, **options)
    assert max(errors(dirty, clean)) < 1e-6


def test_nothing_valid_gives_zero() -> None:
    nothing = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    student, teacher = attention_states(1, 1, 2, 9, (4, 4), dtype=torch.float32, device=DEVICE)
    for algorithm in ("tiles", "gram"):
        options = {"key_mask": nothing, "algorithm": algorithm, "backend": "triton"}
        for value in loss_and_gradients(
            attention_score_mse, leaves_of(student), student, teacher, **options
        ):
            assert not value.any()


def test_launches_do_not_grow_with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd_kernels import attention_score_mse_triton

    seen: dict[str, int] = {}
    for module, names in (
        (attention_score_mse_triton, ["tiles_by_key", "tiles_by_query", "gram_matrices"]),
        (attention_score_mse_triton, ["apply_factors"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), seen, name))
    counts = []
    for pairs in (1, 3):
        seen.clear()
        states = attention_states(pairs, 1, 1, 70, (4, 4), dtype=torch.float32, device=DEVICE)
        for algorithm in ("tiles", "gram"):
            loss = attention_score_mse(*states, algorithm=algorithm, backend="triton")
            loss.sum().backward()
        counts.append(dict(seen))
    assert counts[0] == counts[1]
    assert set(counts[0].values()) <= {1, 2}


@needs_gpu
@pytest.mark.parametrize("dims", [(26, 64), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_at_bert_sizes(dtype: torch.dtype, dims: Any) -> None:
    states = attention_states(2, 2, 12, 300, dims, dtype=dtype, device="cuda")
    mask = masks(2, 300).cuda()
    for algorithm in ("tiles", "gram"):
        given, expected = attention_both(
            states, key_mask=mask, query_mask=mask, algorithm=algorithm
        )
        assert max(errors(given, expected)) <= 4 * torch.finfo(dtype).eps


@needs_gpu
def test_no_host_synchronisation() -> None:
    states = attention_states(2, 2, 4, 64, (16, 16), dtype=torch.float32, device="cuda")
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for algorithm in ("tiles", "gram"):
                attention_score_mse(*states, algorithm=algorithm).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
