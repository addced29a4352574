"""The Triton kernels of attention_divergence against its definition, interpreted or on a GPU."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conditioning import bounds, check_rounding, check_within
from device_marks import no_wait
from divergence_cases import (
    KINDS,
    defined,
    divergence_both,
    exactly_defined,
    holes,
    near_states,
)
from fastkd_kernels import AttentionState, attention_divergence
from fastkd_kernels.attention_divergence import triton_path
from kernel_cases import (
    attention_states,
    cast,
    errors,
    leaves_of,
    loss_and_gradients,
    trained,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
interpreted = pytest.mark.skipif(GPU, reason="fp64 runs in the interpreter, without a GPU")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def triton_both(states: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    return divergence_both(states, backend="triton", **options)


@interpreted
@EVERY_KIND
@pytest.mark.parametrize(
    ("kv_heads", "dims", "tokens", "causal", "window", "masked"),
    [
        ((2, 2), (8, 8), 37, False, None, False),
        ((1, 2), (5, 20), 37, True, None, True),
        ((2, 1), (8, 6), 70, False, 9, True),
        ((2, 2), (4, 4), 1, True, 1, False),
    ],
)
def test_equals_its_definition_in_fp64(
    kv_heads: Any, dims: Any, tokens: int, causal: bool, window: Any, masked: bool, kind: str
) -> None:
    states = attention_states(1 if masked else 2, 1, 2, tokens, dims, kv_heads=kv_heads)
    mask = holes(1, tokens) if masked else None
    options = {"key_mask": mask, "query_mask": mask, "causal": causal, "window": window}
    given, expected = triton_both(states, kind=kind, temperature=1.5, **options)
    assert max(errors(given, expected)) < 1e-12


@EVERY_KIND
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize(
    ("dtype", "long"),
    [
        (torch.float32, False),
        (torch.float16, False),
        (torch.float16, True),
        pytest.param(torch.bfloat16, False, marks=needs_gpu),
    ],
)
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, long: bool, distance: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice the error of plain PyTorch, or what rounding does to the definition."""
    if long:
        # three launches, which newer chips take
        for taken in ("takes_short", "takes_two_sweeps"):
            monkeypatch.setattr(triton_path, taken, lambda *_: False)
    states = near_states(distance, dtype, heads=1, tokens=40, dim=16, device=DEVICE)
    given, _ = triton_both(states, kind=kind, gain=2**10)
    plain = defined(states, kind=kind, gain=2**10)
    check_rounding(exactly_defined(states, kind=kind, gain=2**10), given, anew=True, plain=plain)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "cosine"])
def test_losses_near_the_teacher_keep_digits_that_plain_pytorch_loses(kind: str) -> None:
    states = near_states(1e-3, torch.float32, heads=1, tokens=40, dim=16, device=DEVICE)
    define = exactly_defined(states, kind=kind)
    check_rounding(define, triton_both(states, kind=kind)[0], anew=True)
    with pytest.raises(AssertionError, match=r"output 0: .* above"):
        check_rounding(define, defined(states, kind=kind), anew=True)


@EVERY_KIND
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_models_far_apart(scale: float, kind: str) -> None:
    """Scores of hundreds, where probabilities underflow and the KL's excess overflows."""
    student, teacher = attention_states(1, 1, 1, 40, (8, 8), dtype=torch.float32, device=DEVICE)
    states = [s._replace(scale=scale) for s in student], [t._replace(scale=30.0) for t in teacher]
    given, _ = triton_both(states, kind=kind)
    check_rounding(exactly_defined(states, kind=kind), given, anew=True)


@EVERY_KIND
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("scale", [1e-20, -0.3, 1e20])
def test_hidden_keys_have_no_share_whatever_the_scale(
    scale: float, short: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries make up for the scale; masked and later keys have the largest scores."""
    monkeypatch.setattr(triton_path, "takes_short", lambda *_: short)
    mask = holes(1, 40).to(DEVICE)
    grow = (
        torch.where(mask, 1.0, 50.0)[:, None, :, None] * torch.arange(1, 41, device=DEVICE)[:, None]
    )
    own, target = attention_states(1, 1, 1, 40, (8, 8), dtype=torch.float32, device=DEVICE)
    states = (
        trained([own[0]._replace(query=own[0].query * (0.3 / scale), scale=scale)]),
        [
            target[0]._replace(
                query=target[0].query * (0.3 / scale), key=target[0].key * grow, scale=scale
            )
        ],
    )
    options = {"kind": kind, "key_mask": mask, "query_mask": mask, "causal": True}
    given, _ = triton_both(states, **options)
    check_rounding(exactly_defined(states, **options), given, anew=True)


@EVERY_KIND
def test_student_equal_to_teacher(kind: str) -> None:
    distant, teacher = attention_states(1, 1, 1, 40, (8, 8), dtype=torch.float32, device=DEVICE)
    same = trained(cast(teacher, torch.float32))
    options = {"kind": kind, "backend": "triton"}
    zero = loss_and_gradients(attention_divergence, leaves_of(same), same, teacher, **options)
    far = loss_and_gradients(attention_divergence, leaves_of(distant), distant, teacher, **options)
    check_rounding(exactly_defined((same, teacher), kind=kind), zero, anew=True, scales=far)
    assert zero[0].item() >= 0.0


def test_dtypes_may_differ() -> None:
    student, teacher = attention_states(1, 1, 1, 33, (8, 12), dtype=torch.float32, device=DEVICE)
    states = student, cast(teacher, torch.float16)
    given, _ = triton_both(states)
    check_rounding(exactly_defined(states), given, anew=True)


@interpreted
@EVERY_KIND
def test_gradcheck(kind: str) -> None:
    student, teacher = attention_states(1, 1, 2, 3, (2, 2), kv_heads=(1, 2))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        own = [AttentionState(query, key, None, 0.7)]
        return attention_divergence(own, teacher, kind=kind, backend="triton")

    assert torch.autograd.gradcheck(loss, leaves_of(student), fast_mode=True)


def test_reads_any_strides_and_no_padding() -> None:
    student, teacher = attention_states(
        2, 2, 2, 20, (6, 6), kv_heads=(1, 1), dtype=torch.float32, device=DEVICE
    )
    mask = (torch.arange(20)[None, :] < torch.tensor([20, 7])[:, None]).to(DEVICE)
    options = {"key_mask": mask, "query_mask": mask, "kind": "js", "backend": "triton"}
    clean = loss_and_gradients(
        attention_divergence, leaves_of(student), student, teacher, **options
    )
    defined = {name: value for name, value in options.items() if name != "backend"}
    limits = bounds(exactly_defined((student, teacher), **defined), clean, anew=True)[1]
    for state in (*student, *teacher):
        for tensor in state[:2]:
            tensor.data.masked_fill_(~mask[:, None, :, None], float("nan"))
    spread = [
        s._replace(
            query=s.query.transpose(1, 2).contiguous().transpose(1, 2),
            key=s.key.expand(-1, 2, -1, -1),
        )
        for s in student
    ]
    odd = [t._replace(key=t.key.mT.contiguous().mT) for t in teacher]
    dirty = loss_and_gradients(attention_divergence, leaves_of(student), spread, odd, **options)
    check_within(dirty, clean, limits)


@EVERY_KIND
def test_nothing_valid_gives_zero(kind: str) -> None:
    student, teacher = attention_states(1, 1, 1, 9, (5, 7), dtype=torch.float32, device=DEVICE)
    nothing = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    for value in loss_and_gradients(
        attention_divergence,
        leaves_of(student),
        student,
        teacher,
        key_mask=nothing,
        kind=kind,
        backend="triton",
    ):
        assert not value.any()


class _Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, seen: list[str], name: str) -> None:
        self.kernel, self.seen, self.name = kernel, seen, name

    def __getitem__(self, grid: Any) -> Any:
        self.seen.append(self.name)
        return self.kernel[grid]


def test_three_launches_whatever_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    names = ["_rows_kernel", "_dq_kernel", "_dk_kernel"]
    for name in names:
        kernel = getattr(triton_path, name)
        monkeypatch.setattr(triton_path, name, _Counted(kernel, seen, name))
    for pairs in (1, 3):
        seen.clear()
        states = attention_states(pairs, 1, 1, 9, (4, 4), dtype=torch.float32, device=DEVICE)
        attention_divergence(*states, backend="triton").sum().backward()
        assert seen == names


@EVERY_KIND
def test_keeps_two_gradients(kind: str) -> None:
    """And no map: besides the inputs, which the caller holds anyway."""
    student, teacher = attention_states(1, 1, 2, 40, (8, 8), dtype=torch.float32, device=DEVICE)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention_divergence(student, teacher, kind=kind, backend="triton")
    assert kept == [student[0].query.numel(), student[0].key.numel()]


@needs_gpu
@EVERY_KIND
@pytest.mark.parametrize(
    ("dims", "tokens", "windows"),
    [((26, 64), 300, [64]), ((64, 64), 100, [None, 64]), ((128, 128), 300, [None])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_at_bert_sizes(
    dtype: torch.dtype, dims: Any, tokens: int, windows: Any, kind: str
) -> None:
    states = attention_states(2, 2, 4, tokens, dims, dtype=dtype, device="cuda")
    mask = holes(2, tokens).cuda()
    for window in windows:
        given, expected = triton_both(states, key_mask=mask, kind=kind, window=window)
        # what tensor cores do to operands is not in the model of conditioning.py
        assert max(errors(given, expected)) <= 8 * torch.finfo(dtype).eps


@needs_gpu
def test_no_host_synchronisation() -> None:
    states = attention_states(2, 2, 4, 64, (16, 16), dtype=torch.float32, device="cuda")
    mask = holes(2, 64).cuda()
    for waits in (nullcontext, no_wait):  # the first round compiles
        with waits():
            attention_divergence(*states, key_mask=mask, window=9).sum().backward()
