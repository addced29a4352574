"""Every message for a wrong argument: what was given, what was expected, what to do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fastkd_kernels import (
    AttentionState,
    IndexerState,
    attention_divergence,
    attention_score_mse,
    checks,
    indexer_divergence,
    logits_divergence,
    relation_divergence,
)
from kernel_cases import attention_states


def states() -> tuple[list[AttentionState], list[AttentionState]]:
    return attention_states(1, 2, 4, 6, (3, 5), dtype=torch.float32)


def _replace(side: int, **changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        sides = states()
        sides[side][0] = sides[side][0]._replace(**changes)
        return attention_score_mse(*sides)

    return call


def _options(**options: Any) -> Callable[[], Any]:
    return lambda: attention_score_mse(*states(), **options)


def _several(layers: list[Any], weights: Any = None) -> Callable[[], Any]:
    """A pair with several teacher layers: changes of each, or what stands in its place."""

    def call() -> Any:
        student, teacher = states()
        made = [teacher[0]._replace(**c) if isinstance(c, dict) else c for c in layers]
        return attention_score_mse(student, [made], teacher_weights=weights)

    return call


ATTENTION = [
    (lambda: attention_score_mse(states()[0][0], states()[1]), TypeError, "student must be a list"),
    (lambda: attention_score_mse(states()[0] * 2, states()[1]), ValueError, "2 layers.* has 1"),
    (lambda: attention_score_mse([], []), ValueError, "give at least one layer pair"),
    (lambda: attention_score_mse([(1, 2)], [(1, 2)]), TypeError, "AttentionState, got tuple"),
    (_replace(0, query=None), TypeError, "must be a tensor .* got NoneType"),
    (_replace(0, query=torch.ones(2, 4, 6)), ValueError, r"must be \[batch, heads, tokens"),
    (_replace(0, query=torch.ones(2, 4, 6, 3).int()), TypeError, "is torch.int32; .*cast it"),
    (_replace(0, query=torch.ones(2, 4, 6, 0)), ValueError, "empty dimension"),
    (_replace(1, key=torch.ones(2, 4, 6, 5).half()), TypeError, "its key torch.float16; cast"),
    (_replace(0, key=torch.ones(2, 4, 6, 4)), ValueError, "does not fit its query"),
    (_replace(0, key=torch.ones(2, 3, 6, 3)), ValueError, "4 query heads and 3 key heads"),
    (_replace(0, scale="1"), TypeError, "scale must be a float, got str"),
    (_replace(0, scale=True), TypeError, "scale must be a float, got bool"),
    (_replace(0, scale=0.0), ValueError, "scale is 0.0; .*head_dim"),
    (_replace(0, scale=float("nan")), ValueError, "scale is nan"),
    (_replace(1, query=torch.ones(2, 4, 6, 5, requires_grad=True)), ValueError, "detach"),
    (_replace(1, key=torch.ones(2, 4, 6, 5, requires_grad=True)), ValueError, "key requires grad"),
    (
        _replace(1, query=torch.ones(2, 6, 6, 5), key=torch.ones(2, 6, 6, 5)),
        ValueError,
        "student has 4 heads and the teacher has 6; .*relation heads",
    ),
    (
        _replace(1, query=torch.ones(2, 4, 7, 5), key=torch.ones(2, 4, 7, 5)),
        ValueError,
        r"batch and tokens \(2, 7\); .*same batch",
    ),
    (
        _replace(1, query=torch.ones(2, 4, 6, 5, device="meta")),
        ValueError,
        "is on meta and the student is on cpu; move it",
    ),
    (
        _replace(1, key=torch.ones(2, 4, 6, 5, device="meta")),
        ValueError,
        r"teacher\[0\].key is on meta and the student is on cpu; move it",
    ),
    (_options(key_mask=torch.ones(2, 6)), TypeError, "key_mask is torch.float32; .*bool"),
    (_options(query_mask=[1]), TypeError, "query_mask is list"),
    (_options(key_mask=torch.ones(6, 2).bool()), ValueError, r"\(6, 2\); expected .*\(2, 6\)"),
    (
        _options(key_mask=torch.ones(2, 6, device="meta").bool()),
        ValueError,
        "key_mask is on meta",
    ),
    (_several([], None), ValueError, r"teacher\[0\] is an empty list; give at least one"),
    (_several([3], None), TypeError, r"teacher\[0\]\[0\] must be an AttentionState, got int"),
    (_several([{}], 3), TypeError, "teacher_weights must be a list .* got int"),
    (_several([{}], [None, None]), ValueError, "teacher_weights has 2 entries for 1 pairs"),
    (_several([{}], [0.5]), TypeError, r"teacher_weights\[0\] must be a list .* got float"),
    (_several([{}, {}], [[0.5]]), ValueError, r"teacher_weights\[0\] has 1 weights for 2 teacher"),
    (_several([{}, {}], [[0.5, float("nan")]]), ValueError, r"\[0\] has nan; expected finite"),
    (_several([{}, {}], [[0.5, "1"]]), ValueError, r"\[0\] has '1'; expected finite"),
    (_several([{}, {}], [[0.5, True]]), ValueError, r"\[0\] has True; expected finite"),
    (
        _several([{}, {}], [[1e39, 1.0]]),
        ValueError,
        r"largest of teacher_weights of teacher\[0\], times its layer's scale, is 4.*e\+38; exp",
    ),
    (_several([{}], [[-1e-30]]), ValueError, "is 4.*e-31; expected a size from 1e-20 to 1e"),
    (_several([{}, {}], [[0, 0.0]]), ValueError, r"teacher_weights\[0\] is all zeros; give"),
    (
        _several(
            [{}, {"query": torch.ones(2, 4, 6, 5).half(), "key": torch.ones(2, 4, 6, 5).half()}]
        ),
        TypeError,
        r"teacher\[0\]\[1\] is torch.float16 and teacher\[0\]\[0\] is torch.float32; cast",
    ),
    (
        _several([{}, {"key": torch.ones(2, 2, 6, 5)}]),
        ValueError,
        r"teacher\[0\]\[1\] has 2 key heads and teacher\[0\]\[0\] has 4; .* same number",
    ),
    (
        _several([{}, {"key": torch.ones(2, 4, 6, 5, requires_grad=True)}]),
        ValueError,
        r"teacher\[0\]\[1\].key requires grad",
    ),
    (_options(reduction="mean"), ValueError, "reduction='mean' is not known; choose one of valid"),
    (_options(algorithm="fast"), ValueError, "algorithm='fast' is not known"),
    (_options(backend="cuda"), ValueError, "backend='cuda' is not known"),
]


def _logits(**options: Any) -> Callable[[], Any]:
    return lambda: logits_divergence(torch.ones(3, 4), torch.ones(3, 4), **options)


def _of(op: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    return lambda: op(*states(), **options)


def _relations(**options: Any) -> Callable[[], Any]:
    return _of(relation_divergence, relation="qq", relation_heads=2, **options)


def _indexer(**options: Any) -> Callable[[], Any]:
    indexer = IndexerState(torch.ones(2, 3, 6, 4), torch.ones(2, 6, 4), torch.ones(2, 6, 3))
    return lambda: indexer_divergence([indexer], states()[1], **options)


@pytest.mark.parametrize("value", ["False", None, 0, 4.0, [], torch.tensor(True)])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (_options, "causal"),
        (partial(_of, attention_divergence), "causal"),
        (_relations, "causal"),
        (_indexer, "causal"),
        (_logits, "scale_by_temperature"),
    ],
    ids=["score", "divergence", "relation", "indexer", "logits"],
)
def test_flags_are_true_or_false(call: Any, name: str, value: Any) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
            call(**{name: value})()
        call(**{name: True})()


def test_true_is_no_number() -> None:
    for name in ("temperature", "beta", "skew"):
        with pytest.raises(TypeError, match=f"{name} must be a float, got bool"):
            _logits(**{name: True})()
    with pytest.raises(TypeError, match="temperature must be a float, got bool"):
        _of(attention_divergence, temperature=True)()


@pytest.mark.parametrize(("call", "kind", "message"), ATTENTION)
def test_attention_score_mse(call: Callable[[], Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_triton_needs_cuda_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(checks, "triton_interprets", lambda: False)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, got cpu; .*TRITON_INTERPRET=1"):
        checks.resolve_backend("triton", cpu, torch.float32)
    monkeypatch.setattr(checks, "triton_interprets", lambda: True)
    assert checks.resolve_backend("triton", cpu, torch.float64) == "triton"
    assert checks.resolve_backend("auto", cpu, torch.float32) == "torch"
    assert checks.resolve_backend("auto", torch.device("cuda"), torch.float32) == "triton"
    with pytest.raises(ValueError, match="knows cuda and cpu, not mps"):
        checks.resolve_backend("auto", torch.device("mps"), torch.float32)


def test_a_gpu_runs_fp64_in_pytorch() -> None:
    gpu = torch.device("cuda")
    assert checks.resolve_backend("auto", gpu, torch.float64) == "torch"
    with pytest.raises(ValueError, match="takes bf16, fp16 and fp32 on a GPU, got float64; use"):
        checks.resolve_backend("triton", gpu, torch.float64)


def test_triton_limits() -> None:
    student, teacher = attention_states(1, 1, 1, 2, (300, 4), dtype=torch.float32)

    def run(**options: Any) -> torch.Tensor:
        return attention_score_mse(student, teacher, backend="triton", **options)

    with pytest.raises(ValueError, match=r"head size 300 .* up to 256; use algorithm='gram' or"):
        run(algorithm="tiles")
    for algorithm in ("auto", "tiles", "gram"):
        with pytest.raises(ValueError, match=r"300 .* up to 256; use backend='torch'"):
            run(algorithm=algorithm, causal=True)
