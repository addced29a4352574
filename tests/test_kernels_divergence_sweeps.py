"""Divergences of long sequences in two sweeps: half precision against the definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
import triton.language as tl
from conditioning import check_rounding, exactly
from divergence_cases import exactly_defined, holes, near_states
from fastkd_kernels import AttentionDivergenceKind, attention_divergence
from fastkd_kernels.attention_divergence import triton_path
from fastkd_kernels.common import launch
from fastkd_kernels.common.head_groups import Pair
from kernel_cases import (
    attention_states,
    cast,
    leaves_of,
    loss_and_gradients,
    trained,
)

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GAIN = 2**10
KINDS = get_args(AttentionDivergenceKind)


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test here runs the two sweeps, interpreted with the blocks of an H100."""
    if torch.cuda.is_available() and not launch.holds_products():
        pytest.skip("products of this GPU do not land in registers")
    blocks_of(90, monkeypatch)
    calls = []
    run = triton_path._two_sweeps
    monkeypatch.setattr(triton_path, "_two_sweeps", lambda *given: calls.append(1) or run(*given))
    yield
    assert calls


def blocks_of(chip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, those of a chip; on a GPU its own."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(launch, "architecture", lambda: chip)


def triton_made(states: Any, **options: Any) -> list[torch.Tensor]:
    leaves = leaves_of(states[0])
    return loss_and_gradients(attention_divergence, leaves, *states, backend="triton", **options)


def check(states: Any, **options: Any) -> list[torch.Tensor]:
    """Loss and gradients, in half precision, against the definition in fp64."""
    given = triton_made(states, gain=GAIN, **options)
    check_rounding(exactly_defined(states, gain=GAIN, **options), given, anew=True)
    return given


def prefix(tokens: int, *lengths: int) -> torch.Tensor:
    return torch.arange(tokens, device=DEVICE)[None] < torch.tensor(lengths, device=DEVICE)[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("chip", "kv_heads", "dims", "tokens", "causal", "window", "mask"),
    [
        (90, (2, 2), (8, 20), 256, False, None, None),
        (80, (1, 2), (26, 12), 300, False, None, "right"),
        (90, (2, 1), (8, 6), 300, True, None, "left"),
        (80, (2, 2), (8, 8), 270, True, 50, "holes"),
        (90, (2, 2), (8, 8), 129, False, 9, None),
        (80, (2, 2), (4, 70), 140, True, None, "none"),
    ],
)
def test_equals_its_definition(
    chip: int,
    kv_heads: Any,
    dims: Any,
    tokens: int,
    causal: bool,
    window: Any,
    mask: Any,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks_of(chip, monkeypatch)
    states = attention_states(
        1, 2, 2, tokens, dims, kv_heads=kv_heads, dtype=torch.float16, device=DEVICE
    )
    masks = {
        None: None,
        "right": prefix(tokens, 260, 5),
        "left": ~prefix(tokens, 140, 0),
        "holes": holes(2, tokens).to(DEVICE),
        "none": prefix(tokens, 0, tokens),
    }
    # rows that are not counted lie elsewhere than hidden keys
    rows = None if mask is None else masks[mask].flip(0)
    check(states, kind=kind, causal=causal, window=window, key_mask=masks[mask], query_mask=rows)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cross_entropy"])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_near_the_teacher(distance: float, kind: str) -> None:
    states = near_states(distance, torch.float16, heads=1, tokens=150, dim=16, device=DEVICE)
    assert (check(states, kind=kind)[0] >= 0.0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_grow_from_block_to_block(kind: str) -> None:
    """Where maxima move, each model's by its own, and blocks have a hidden key each."""
    states = attention_states(1, 1, 1, 600, (8, 8), dtype=torch.float16, device=DEVICE)
    position = torch.arange(600, device=DEVICE)
    with torch.no_grad():
        states[0][0].key.mul_((1.0 + position / 300)[:, None])
        states[1][0].key.mul_((1.0 + position / 600)[:, None])
    check(states, kind=kind, temperature=0.5, key_mask=position[None] % 128 != 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("place", "size"), [(3, 80.0), (140, 80.0), (299, 80.0), (140, 16.5)])
def test_scores_far_above_those_of_the_first_block(place: int, size: float, kind: str) -> None:
    """2^62 or 2^320 times the first block's exponentials, whose sums or squares would overflow."""
    student, teacher = attention_states(1, 1, 1, 300, (8, 8), dtype=torch.float16, device=DEVICE)
    # the teacher looks at one key, the student at two: of one alone, most kinds have no slope
    with torch.no_grad():
        student[0].query.fill_(1.0)
        student[0].key[..., [place, 299 - place], :] = size
        student[0].key[..., place, ::2] = student[0].key[..., 299 - place, 1::2] = 0.0
        teacher[0].query.fill_(1.0)
        teacher[0].key[..., place, :] = 0.5 * size
    states, options = (student, teacher), {"kind": kind, "temperature": 0.5, "gain": GAIN}
    define = exactly_defined(states, **options)
    loss, *gradients = triton_made(states, **options)
    exact = define(exactly)[0].float()
    check_rounding(define, [exact, *gradients], anew=True)
    # log-sum-exps of up to 2^10 bits are rounded by 2^-24 of that, in every row alike
    torch.testing.assert_close(loss, exact, rtol=2.0**-13, atol=0.0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cross_entropy"])
def test_a_teacher_of_its_own_student_costs_nothing(kind: str) -> None:
    _, teacher = attention_states(1, 1, 2, 150, (8, 8), dtype=torch.float16, device=DEVICE)
    same = trained(cast(teacher, torch.float16))
    made = triton_made((same, teacher), kind=kind, gain=2.0**40)
    assert all(not value.any() for value in made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU rounds bf16 slopes itself")
@pytest.mark.parametrize("kind", KINDS)
def test_sharp_maps_far_apart_keep_what_slopes_are_rounded_to(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slopes enter their products in half precision, as those of bf16 do, and lose no more.

    The interpreter has fp16 alone, and hidden keys in each block keep exponentials in its range.
    """
    types = triton_path.kernel_types
    monkeypatch.setattr(
        triton_path, "kernel_types", lambda *dtypes: types(*dtypes) | {"GRAD_TYPE": tl.float16}
    )
    states = attention_states(2, 1, 2, 300, (8, 8), dtype=torch.float16, device=DEVICE)
    mask = torch.arange(300, device=DEVICE)[None] % 128 != 5
    options = {"kind": kind, "temperature": 0.25, "gain": GAIN, "key_mask": mask}
    given = triton_made(states, **options)
    define = exactly_defined(states, **options)
    check_rounding(define, given, anew=True, operands=torch.float16)


def test_scores_that_are_capped_turned_or_with_sinks_are_left_to_other_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    for name in ("_two_sweeps", "_long"):
        run = getattr(triton_path, name)
        monkeypatch.setattr(
            triton_path, name, lambda *given, name=name, run=run: taken.append(name) or run(*given)
        )
    heads, sinks = torch.empty(1, 2, 300, 8, dtype=torch.float16, device=DEVICE), torch.zeros(2)
    plain = Pair(heads, heads, heads, heads, 0.1, 0.2)
    others = [
        plain._replace(scale=-0.1),
        plain._replace(teacher_scale=-0.2),
        plain._replace(student_softcap=3.0),
        plain._replace(teacher_softcap=3.0),
        plain._replace(student_sinks=sinks, teacher_sinks=sinks),
    ]
    for pair in (plain, *others):
        triton_path.forward([pair], False, "kl", False, 0, True)
    assert taken == ["_two_sweeps", *["_long"] * len(others)]
