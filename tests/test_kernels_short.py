"""The kernels that take short sequences whole, in every form: in fp64, by the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caps_cases import exact, formed, op_of
from divergence_cases import KINDS, holes
from fastkd_kernels import attention_divergence, attention_score_mse, reference
from fastkd_kernels.attention_divergence import triton_path as divergence_path
from fastkd_kernels.attention_score_mse import triton_path as score_path
from fastkd_kernels.common import launch
from fastkd_kernels.common.rescale import rescaled, stacked_gradient
from fastkd_kernels.common.short_sequences import heads_of_program, short_launch, takes_short
from kernel_cases import (
    Counted,
    attention_states,
    cast,
    errors,
    leaves_of,
    loss_and_gradients,
    trained,
)

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
interpreted = pytest.mark.skipif(GPU, reason="fp64 runs in the interpreter, without a GPU")


@pytest.fixture
def every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences of any dtype take the short kernels, several heads a program."""
    for path in (score_path, divergence_path):
        monkeypatch.setattr(path, "takes_short", lambda *_: True)
        monkeypatch.setattr(path, "heads_of_program", lambda heads, kv, _: heads // kv * 2)


@interpreted
@pytest.mark.usefixtures("every_dtype")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims", "tokens", "causal", "masked"),
    [
        (2, (2, 2), (8, 12), 37, False, False),
        (4, (2, 4), (5, 20), 37, True, True),
        (4, (4, 2), (8, 6), 70, False, True),
        (2, (2, 2), (4, 4), 1, True, False),
    ],
)
def test_score_mse_equals_its_definition(
    heads: int, kv_heads: Any, dims: Any, tokens: int, causal: bool, masked: bool
) -> None:
    states = attention_states(2, 1, heads, tokens, dims, kv_heads=kv_heads)
    mask = holes(1, tokens) if masked else None
    options: dict[str, Any] = {"key_mask": mask, "query_mask": mask, "causal": causal}
    given = loss_and_gradients(
        attention_score_mse, leaves_of(states[0]), *states, **options, backend="triton"
    )
    student = trained(cast(states[0], torch.float64))
    expected = loss_and_gradients(
        reference.attention_score_mse, leaves_of(student), student, states[1], **options
    )
    assert max(errors(given, expected)) < 1e-12


@interpreted
@pytest.mark.usefixtures("every_dtype")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("form", "kv_heads", "dims", "tokens", "causal", "window", "masked"),
    [
        ("plain", (2, 2), (8, 12), 37, False, None, False),
        ("caps and sinks", (2, 4), (5, 20), 37, True, 5, True),
        ("sinks", (4, 2), (8, 6), 40, False, 9, True),
        ("student capped", (4, 4), (4, 4), 1, True, 1, False),
    ],
)
def test_divergence_equals_its_definition(
    form: str,
    kv_heads: Any,
    dims: Any,
    tokens: int,
    causal: bool,
    window: Any,
    masked: bool,
    kind: str,
) -> None:
    states = attention_states(1, 2, 4, tokens, dims, kv_heads=kv_heads)
    mask = holes(2, tokens) if masked else None
    options = {"key_mask": mask, "query_mask": mask, "causal": causal, "window": window}
    options |= {"kind": kind, "temperature": 1.5, "backend": "triton"}
    if form != "plain":
        states = formed(states, form)
    assert max(errors(op_of(states, **options), exact(states, **options))) < 1e-12


@pytest.mark.parametrize("path", [score_path, divergence_path])
def test_short_half_precision_takes_one_launch(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    op = attention_score_mse if path is score_path else attention_divergence
    seen: dict[str, int] = {}
    for name in [name for name in vars(path) if name.startswith("_") and name.endswith("_kernel")]:
        monkeypatch.setattr(path, name, Counted(getattr(path, name), seen, name))
    states = attention_states(2, 2, 2, 20, (4, 4), dtype=torch.float16, device=DEVICE)
    op(*states, backend="triton").sum().backward()
    assert seen == {"_short_kernel": 1}


@pytest.mark.parametrize("op", [attention_score_mse, attention_divergence])
@pytest.mark.parametrize("tokens", [20, 140])
def test_gradients_are_laid_out_as_their_inputs(op: Any, tokens: int) -> None:
    """So that autograd copies none back into what a model projected."""
    student, teacher = attention_states(1, 2, 4, tokens, (8, 8), dtype=torch.float32, device=DEVICE)
    rows = [torch.randn(2, tokens, 4, 8, device=DEVICE).requires_grad_() for _ in range(2)]
    query, key = (row.transpose(1, 2) for row in rows)
    states = [student[0]._replace(query=query, key=key)]
    made = torch.autograd.grad(op(states, teacher, backend="triton").sum(), [query, key])
    for gradient, given in zip(made, (query, key), strict=True):
        assert gradient.dtype == given.dtype
        assert gradient.stride() == given.stride()


@pytest.mark.parametrize(("tokens", "apart"), [(1 << 19, 128), ((1 << 19) - 1, 32 * 128)])
def test_gradients_whose_rows_lie_far_apart_lie_head_by_head(tokens: int, apart: int) -> None:
    """Kernels find a row of a head by 32 bits."""
    heads = torch.empty(1, tokens, 32, 128, device="meta").transpose(1, 2)
    made = stacked_gradient(2, heads, torch.bfloat16)
    assert made.shape == (2, *heads.shape) and made.stride()[-2:] == (apart, 1)
    assert made.stride(-2) * (tokens - 1) < 1 << 31


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_of_the_rescaling(dtype: torch.dtype) -> None:
    units = torch.randn(2, 3, 5, 7).transpose(1, 2), torch.randn(2, 3, 4)
    factor = torch.tensor([0.5, -2.0])
    torch.library.opcheck(torch.ops.fastkd_kernels.rescaled.default, (*units, factor, dtype))
    for unit, made in zip(units, rescaled(*units, factor, dtype), strict=True):
        wide = factor.view(2, *[1] * (unit.ndim - 1))
        assert torch.equal(made, (unit * wide).to(dtype))
        assert made.stride() == unit.stride()


def test_launches_keep_to_the_shared_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a desktop GPU has (sm_86, sm_89), an A100 and an H100."""
    half = (torch.bfloat16, torch.bfloat16)
    stages = {}
    for limit in (101_376, 166_912, 232_448):
        monkeypatch.setattr(launch, "shared_memory", lambda limit=limit: limit)
        ahead = [path.SHORT_STAGES for path in (score_path, divergence_path)]
        made = [short_launch(128, (26, 64), half, stages_of) for stages_of in ahead]
        stages[limit] = [one.num_stages for one in made]
        assert launch.is_large() == (limit > 101_376)
    assert stages == {101_376: [1, 1], 166_912: [2, 2], 232_448: [3, 2]}
    # 129 tokens would take blocks of 256
    assert takes_short(128, (26, 64), half) and not takes_short(129, (26, 64), half)
    for kernel in ("rows", "dq", "dk"):
        few = divergence_path.divergence_launch(kernel, "kl", (128, 128), half, large=False)
        assert few.num_stages == 1
        assert max(few.block("BLOCK_QUERY"), few.block("BLOCK_KEY")) == 64
    few = score_path.tile_launch("fwd", 512, (128, 128), half, large=False)
    assert (few.block("BLOCK_KEY"), few.num_stages) == (64, 1)


def test_heads_of_a_program() -> None:
    """As many as leave work for every multiprocessor, and never a part of a key head's."""
    assert heads_of_program(12, 12, 256) == 12
    assert heads_of_program(12, 12, 64) == 3
    assert heads_of_program(12, 12, 1) == 1
    assert heads_of_program(12, 4, 1) == 3
    assert heads_of_program(12, 1, 10_000) == 12
