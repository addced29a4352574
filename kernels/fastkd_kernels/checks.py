"""Checks of what a caller hands in; each message says what was given, expected, and what to do."""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from .launch import triton_interprets
from .types import AttentionState, Backend, Reduction

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# colder, hardly any gradient is left; hotter, fp32 rounds away what tells the models apart
TEMPERATURES = (1e-3, 1e3)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def check_temperature(temperature: float) -> None:
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a float, got {type(temperature).__name__}")
    lowest, highest = TEMPERATURES
    if not lowest <= temperature <= highest:
        raise ValueError(
            f"temperature is {temperature}; expected {lowest:g} to {highest:g}, between which fp32 "
            "tells scores over the temperature apart"
        )


def check_pairs(student: Sequence[object], teacher: Sequence[object]) -> None:
    """One teacher entry for every student entry, and at least one pair."""
    for name, side in (("student", student), ("teacher", teacher)):
        if not isinstance(side, (list, tuple)) or isinstance(side, AttentionState):
            raise TypeError(
                f"{name} must be a list or tuple with one entry a layer pair, "
                f"got {type(side).__name__}; wrap a single layer in a list"
            )
    if len(student) != len(teacher):
        raise ValueError(
            f"student has {len(student)} layers and teacher has {len(teacher)}; "
            "give one teacher entry for every student entry"
        )
    if len(student) == 0:
        raise ValueError("student and teacher are empty; give at least one layer pair")


def check_tensor(name: str, value: object, dims: str) -> None:
    """`value` is a floating tensor with the dimensions named in `dims`, none of them empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor [{dims}], got {type(value).__name__}")
    if value.ndim != dims.count(",") + 1:
        raise ValueError(f"{name} must be [{dims}], got shape {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name} is {value.dtype}; expected bfloat16, float16, float32 or float64, "
            "so cast it first"
        )
    if 0 in value.shape:
        raise ValueError(f"{name} has an empty dimension: shape {tuple(value.shape)}; drop it")


def check_frozen(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but only the student is trained; "
            "run the teacher under torch.no_grad() or detach() its tensors"
        )


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{name} is on {value.device} and the student is on {device}; move it to {device}"
        )


def check_mask(name: str, mask: Tensor | None, batch: int, tokens: int, on: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name} is {given}; expected a bool tensor, True at valid tokens "
            f"(an integer attention mask becomes one with .bool())"
        )
    if tuple(mask.shape) != (batch, tokens):
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; expected [batch, tokens] = ({batch}, {tokens})"
        )
    check_device(name, mask, on)


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, get_args(Reduction))


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "auto" by device: CUDA runs Triton, the CPU runs PyTorch. Never a silent fallback.

    `dtype` is that of `accumulator`; in fp64 Triton makes no products on a GPU.
    """
    check_choice("backend", backend, get_args(Backend))
    if backend == "auto":
        if device.type not in ("cuda", "cpu"):
            raise ValueError(
                f"backend='auto' knows cuda and cpu, not {device.type}; pass backend='torch'"
            )
        narrow = dtype != torch.float64
        return "triton" if device.type == "cuda" and narrow else "torch"
    # a trace cannot read Triton's settings: there Triton itself says that it has no driver
    traced = torch.compiler.is_compiling()
    if backend == "triton" and device.type != "cuda" and not traced and not triton_interprets():
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got {device.type}; use backend='auto', or set "
            "TRITON_INTERPRET=1 before triton is imported to run the kernels in the interpreter"
        )
    if backend == "triton" and dtype == torch.float64 and device.type == "cuda":
        raise ValueError(
            "backend='triton' takes bf16, fp16 and fp32 on a GPU, got float64; use backend='auto' "
            "or 'torch', which run PyTorch"
        )
    return backend


def check_states(student: Sequence[AttentionState], teacher: Sequence[AttentionState]) -> None:
    """Every pair fits together, and all pairs share batch, tokens and device."""
    check_pairs(student, teacher)
    for pair, (own, target) in enumerate(zip(student, teacher, strict=True)):
        check_target(pair, own, f"teacher[{pair}]", target, first=student[0])


def check_target(
    pair: int, own: AttentionState, name: str, target: AttentionState, *, first: AttentionState
) -> None:
    """The teacher state `name` fits the student of its pair, and both fit the `first` student."""
    sides = ((f"student[{pair}]", own), (name, target))
    for side, state in sides:
        _check_state(side, state)
    for side, state in sides:
        check_device(f"{side}.query", state.query, first.query.device)
        check_device(f"{side}.key", state.key, first.query.device)
    check_frozen(f"{name}.query", target.query)
    check_frozen(f"{name}.key", target.key)
    heads, target_heads = own.query.shape[1], target.query.shape[1]
    if heads != target_heads:
        raise ValueError(
            f"pair {pair}: the student has {heads} heads and the teacher has {target_heads}; "
            "heads are compared one by one, so use relation_divergence, which cuts both sides "
            "into the same number of relation heads (MiniLMv2)"
        )
    expected = (first.query.shape[0], first.query.shape[2])
    for side, state in sides:
        given = (state.query.shape[0], state.query.shape[2])
        if given != expected:
            raise ValueError(
                f"{side}.query has batch and tokens {given}; expected those of "
                f"student[0], {expected}; run both models on the same batch"
            )


def check_caps_and_sinks(
    student: Sequence[AttentionState], teacher: Sequence[AttentionState]
) -> None:
    """Soft caps and sinks of states that `check_states` has passed."""
    for pair, states in enumerate(zip(student, teacher, strict=True)):
        names = (f"student[{pair}]", f"teacher[{pair}]")
        for name, state in zip(names, states, strict=True):
            _check_softcap(f"{name}.softcap", state.softcap)
            _check_sinks(f"{name}.sinks", state)
        given = [state.sinks is not None for state in states]
        if given[0] != given[1]:
            raise ValueError(
                f"pair {pair}: {names[given[1]]}.sinks is a tensor and "
                f"{names[given[0]]}.sinks is None; a sink takes its share of each row, so give "
                "both sides sinks or neither"
            )
        if states[1].sinks is not None:
            check_frozen(f"{names[1]}.sinks", states[1].sinks)


def _check_softcap(name: str, softcap: object) -> None:
    if softcap is None:
        return
    if not isinstance(softcap, (int, float)) or isinstance(softcap, bool):
        raise TypeError(f"{name} must be a float or None, got {type(softcap).__name__}")
    if not (math.isfinite(softcap) and softcap > 0.0):
        raise ValueError(
            f"{name} is {softcap}; expected a finite number above 0, or None for no cap"
        )


def _check_sinks(name: str, state: AttentionState) -> None:
    if state.sinks is None:
        return
    check_tensor(name, state.sinks, "heads")
    heads = state.query.shape[1]
    if state.sinks.shape[0] != heads:
        raise ValueError(
            f"{name} has {state.sinks.shape[0]} entries for {heads} query heads; give one for each"
        )
    check_device(name, state.sinks, state.query.device)


def _check_state(name: str, state: object) -> None:
    if not isinstance(state, AttentionState):
        raise TypeError(f"{name} must be an AttentionState, got {type(state).__name__}")
    check_tensor(f"{name}.query", state.query, "batch, heads, tokens, head_dim")
    check_tensor(f"{name}.key", state.key, "batch, kv_heads, tokens, head_dim")
    query, key = state.query, state.key
    if query.dtype != key.dtype:
        raise TypeError(f"{name}.query is {query.dtype} and its key {key.dtype}; cast one of them")
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(
            f"{name}.key has shape {tuple(key.shape)}, which does not fit its query "
            f"{tuple(query.shape)}; batch, tokens and head_dim must agree"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{name} has {query.shape[1]} query heads and {key.shape[1]} key heads; "
            "the key heads must divide the query heads"
        )
    if not isinstance(state.scale, (int, float)):
        raise TypeError(f"{name}.scale must be a float, got {type(state.scale).__name__}")
    if not math.isfinite(state.scale) or state.scale == 0.0:
        raise ValueError(
            f"{name}.scale is {state.scale}; expected a finite factor other than 0, "
            "usually head_dim ** -0.5"
        )
