"""The kernel of attention-score MSE that forms every score once, beyond short sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divergence_cases import holes
from fastkd_kernels import AttentionState, attention_score_mse, reference
from fastkd_kernels.attention_score_mse import triton_path
from fastkd_kernels.common import launch, plan
from fastkd_kernels.common.head_groups import pairs_of
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
TILES: dict[str, Any] = {"backend": "triton", "algorithm": "tiles"}


@pytest.mark.skipif(GPU, reason="fp64 runs in the interpreter, without a GPU")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims", "tokens", "causal", "masked"),
    [
        (1, (1, 1), (8, 12), 129, False, False),
        (4, (2, 4), (5, 20), 200, True, True),
        (4, (4, 2), (8, 6), 257, False, True),
        (2, (1, 2), (40, 16), 300, True, True),
        (1, (1, 1), (26, 64), 384, True, False),
        (2, (1, 1), (4, 4), 512, True, True),
        (2, (2, 1), (4, 8), 450, False, True),
    ],
)
def test_equals_its_definition(
    heads: int,
    kv_heads: Any,
    dims: Any,
    tokens: int,
    causal: bool,
    masked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One, two and three passes, one and two blocks of keys in each, all in fp64."""
    monkeypatch.setattr(triton_path, "takes_sweep", lambda *_: True)
    states = attention_states(1, 2, heads, tokens, dims, kv_heads=kv_heads)
    options: dict[str, Any] = {"causal": causal}
    if masked:
        mask = holes(2, tokens)
        options |= {"key_mask": mask, "query_mask": mask.flip(1)}
    given = loss_and_gradients(
        attention_score_mse, leaves_of(states[0]), *states, **options, **TILES
    )
    student = trained(cast(states[0], torch.float64))
    expected = loss_and_gradients(
        reference.attention_score_mse, leaves_of(student), student, states[1], **options
    )
    assert max(errors(given, expected)) < 1e-12
    with torch.no_grad():
        assert torch.equal(attention_score_mse(*states, **options, **TILES), given[0])


def test_half_precision_takes_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a projection, whose gradients are laid out as they are; two launches elsewhere."""
    monkeypatch.setattr(triton_path, "FEWEST_PROGRAMS", 8)
    seen: dict[str, int] = {}
    for name in ("_short_kernel", "_sweep_kernel", "_tiles_fwd_kernel", "_tiles_bwd_dq_kernel"):
        monkeypatch.setattr(triton_path, name, Counted(getattr(triton_path, name), seen, name))
    rows = [torch.randn(2, 150, 2, 8, dtype=torch.float16, device=DEVICE) for _ in range(4)]
    query, key, *teacher = (row.transpose(1, 2) for row in rows)
    student = [query.requires_grad_(), key.requires_grad_()]
    states = [AttentionState(*side, None, 0.3) for side in (student, teacher)]
    made = loss_and_gradients(attention_score_mse, student, *([one] for one in states), **TILES)
    assert seen == {"_sweep_kernel": 1}
    assert [one.stride() for one in made[1:]] == [one.stride() for one in student]
    wide = [one.detach().double().requires_grad_() for one in student]
    exact = [
        AttentionState(*wide, None, 0.3),
        states[1]._replace(query=teacher[0].double(), key=teacher[1].double()),
    ]
    expected = loss_and_gradients(reference.attention_score_mse, wide, *([one] for one in exact))
    # gradients are rounded to fp16 before and after the upstream gradient multiplies them
    assert max(errors(made, expected)) < 2 * torch.finfo(torch.float16).eps
    monkeypatch.setattr(triton_path, "FEWEST_PROGRAMS", 10)
    plan._plans.clear()
    loss_and_gradients(attention_score_mse, student, *([one] for one in states), **TILES)
    assert seen == {"_sweep_kernel": 1, "_tiles_fwd_kernel": 1, "_tiles_bwd_dq_kernel": 1}


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of keys a pass where registers hold their gradients; ahead as memory allows."""
    monkeypatch.setattr(triton_path, "_TRITON_3_6", False)
    half = (torch.bfloat16, torch.bfloat16)
    blocks = {}
    for tokens, dims in [(512, (26, 64)), (384, (26, 64)), (256, (26, 64)), (512, (64, 64))]:
        made = triton_path.sweep_launch(tokens, dims, half)
        blocks[tokens, dims] = made.block("KEY_BLOCKS"), made.block("PASSES")
    assert list(blocks.values()) == [(2, 2), (1, 3), (2, 1), (1, 4)]
    monkeypatch.setattr(launch, "shared_memory", lambda: 101_376)
    assert triton_path.sweep_launch(500, (26, 64), half).num_stages == 2
    assert triton_path.sweep_launch(500, (64, 64), (torch.float16,) * 2).num_stages == 1
    assert not triton_path.takes_sweep(127, (26, 64), half)
    assert triton_path.takes_sweep(128, (26, 64), half)
    assert not triton_path.takes_sweep(128, (26, 64), half, "hip")
    assert not triton_path.takes_sweep(128, (26, 128), half)


def test_triton_3_6_gets_no_single_pass_of_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks(tokens: int) -> tuple[object, object]:
        constants = triton_path.sweep_launch(tokens, (26, 64), (torch.bfloat16,) * 2).constants
        return constants["KEY_BLOCKS"], constants["PASSES"]

    monkeypatch.setattr(triton_path, "_TRITON_3_6", False)
    assert [*map(blocks, (256, 500))] == [(2, 1), (2, 2)]
    monkeypatch.setattr(triton_path, "_TRITON_3_6", True)
    assert [*map(blocks, (256, 500))] == [(1, 2), (2, 2)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(26, 64), (64, 64)])
def test_half_precision_with_masks(
    dims: Any, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the sizes of BERT where there is a GPU."""
    monkeypatch.setattr(triton_path, "FEWEST_PROGRAMS", 8)
    seen: dict[str, int] = {}
    monkeypatch.setattr(
        triton_path, "_sweep_kernel", Counted(triton_path._sweep_kernel, seen, "sweep")
    )
    dtype, tokens, heads = (torch.bfloat16, 500, 12) if GPU else (torch.float16, 270, 2)
    states = attention_states(2, 2, heads, tokens, dims, dtype=dtype, device=DEVICE)
    mask = holes(2, tokens).to(DEVICE)
    options: dict[str, Any] = {"causal": causal, "key_mask": mask, "query_mask": mask.flip(1)}
    given = loss_and_gradients(
        attention_score_mse, leaves_of(states[0]), *states, **options, **TILES
    )
    assert seen == {"sweep": 1}
    sides = [cast(side, torch.float64) for side in states]
    student = trained(sides[0])
    expected = loss_and_gradients(
        reference.attention_score_mse, leaves_of(student), student, sides[1], **options
    )
    # what tensor cores do to operands is not in the model of conditioning.py
    assert max(errors(given, expected)) <= 4 * torch.finfo(dtype).eps


def test_heads_out_of_the_reach_of_32_bits_are_left_to_other_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(triton_path, "takes_sweep", lambda *_: True)
    monkeypatch.setattr(triton_path, "_sweep", lambda *_: taken.append("sweep"))
    monkeypatch.setattr(triton_path, "_tiles", lambda *_: taken.append("tiles"))
    for tokens in ((1 << 21) - 1, 1 << 21):
        side = torch.empty(1, 16, tokens, 64, dtype=torch.bfloat16, device="meta")
        pair = pairs_of([side], [side], [side], [side], [0.1], [0.1])
        triton_path.one_pass(pair, False, False, "tiles", True)
    assert taken == ["sweep", "tiles"]
