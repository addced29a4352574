"""Checks of what a caller hands in; each message says what was given, expected, and what to do."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, get_args

import torch
from torch import Tensor

from .common.attention_columns import Columns, Masks, columns_of
from .common.autograd import accumulator
from .common.launch import triton_interprets
from .common.plan import Look, look_of_options
from .common.remembered import is_eager
from .types import (
    AttentionState,
    Backend,
    IndexerState,
    LogitsDivergenceKind,
    LogitsHead,
    Reduction,
    Tokens,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# colder, hardly any gradient is left; hotter, fp32 rounds away what tells the models apart
TEMPERATURES = (1e-3, 1e3)
# of scales and soft caps, which fp32 holds, with their reciprocals
SCALES = (1e-20, 1e20)

# of a mixture: the logarithm of the rest keeps four digits in fp32
LEAST_SHARE = 1e-4


class Seen(NamedTuple):
    """States of a call as lists over pairs, and the look by which its plan is found."""

    columns: Columns
    look: Look


def look_at_states(student: object, teacher: object, masks: Masks, *options: object) -> Seen | None:
    """None if the checks must see for themselves; there is one teacher layer a pair otherwise."""
    lists = (list, tuple)
    if not is_eager() or type(student) not in lists or type(teacher) not in lists:
        return None
    sides: tuple[Any, Any] = (student, teacher)
    if not student or {*map(type, sides[0]), *map(type, sides[1])} != {AttentionState}:
        return None
    columns = columns_of(*sides)
    numbers = (*columns.scale, *columns.teacher_scale, *columns.softcap, *columns.teacher_softcap)
    heads = (*columns.query, *columns.key, *columns.teacher_query, *columns.teacher_key)
    given = (len(sides[0]), len(sides[1]), *numbers, *options)
    look = look_of_options(given, (*heads, *columns.sinks, *columns.teacher_sinks, *masks))
    return None if look is None else Seen(columns, look)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a Python number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_temperature(temperature: float) -> None:
    if not is_number(temperature):
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
        if not isinstance(side, (list, tuple)) or isinstance(side, (AttentionState, IndexerState)):
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
    for pair, (student_state, teacher_state) in enumerate(zip(student, teacher, strict=True)):
        check_teacher(pair, student_state, f"teacher[{pair}]", teacher_state, first=student[0])


def check_teacher(
    pair: int,
    student_state: AttentionState,
    name: str,
    teacher_state: AttentionState,
    *,
    first: AttentionState,
) -> None:
    """The teacher state `name` fits the student of its pair, and both fit the `first` student."""
    sides = ((f"student[{pair}]", student_state), (name, teacher_state))
    for side, state in sides:
        check_state(side, state)
    for side, state in sides:
        check_device(f"{side}.query", state.query, first.query.device)
        check_device(f"{side}.key", state.key, first.query.device)
    check_frozen(f"{name}.query", teacher_state.query)
    check_frozen(f"{name}.key", teacher_state.key)
    heads, teacher_heads = student_state.query.shape[1], teacher_state.query.shape[1]
    if heads != teacher_heads:
        raise ValueError(
            f"pair {pair}: the student has {heads} heads and the teacher has {teacher_heads}; "
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
            check_softcap(f"{name}.softcap", state.softcap)
            check_sinks(f"{name}.sinks", state)
        given = [state.sinks is not None for state in states]
        if given[0] != given[1]:
            raise ValueError(
                f"pair {pair}: {names[given[1]]}.sinks is a tensor and "
                f"{names[given[0]]}.sinks is None; a sink takes its share of each row, so give "
                "both sides sinks or neither"
            )
        if states[1].sinks is not None:
            check_frozen(f"{names[1]}.sinks", states[1].sinks)


def check_softcap(name: str, softcap: object) -> None:
    if softcap is None:
        return
    if not is_number(softcap):
        raise TypeError(f"{name} must be a float or None, got {type(softcap).__name__}")
    smallest, largest = SCALES
    if not smallest <= softcap <= largest:
        raise ValueError(
            f"{name} is {softcap}; expected a number from {smallest:g} to {largest:g}, or None for "
            "no cap"
        )


def check_sinks(name: str, state: AttentionState) -> None:
    if state.sinks is None:
        return
    check_tensor(name, state.sinks, "heads")
    heads = state.query.shape[1]
    if state.sinks.shape[0] != heads:
        raise ValueError(
            f"{name} has {state.sinks.shape[0]} entries for {heads} query heads; give one for each"
        )
    check_device(name, state.sinks, state.query.device)


def check_state(name: str, state: object) -> None:
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
    _check_scale(f"{name}.scale", state.scale, "head_dim ** -0.5")


def _check_scale(name: str, scale: object, usual: str) -> None:
    if not is_number(scale):
        raise TypeError(f"{name} must be a float, got {type(scale).__name__}")
    smallest, largest = SCALES
    if not smallest <= abs(scale) <= largest:
        raise ValueError(
            f"{name} is {scale}; expected a factor of a size from {smallest:g} to "
            f"{largest:g}, usually {usual}"
        )


def look_at_hidden(
    student: object,
    teacher: object,
    weight: object,
    bias: object,
    mask: Tensor | None,
    *options: object,
) -> Look | None:
    """None if the checks must see for themselves."""
    lists = (list, tuple)
    if type(student) not in lists or type(teacher) not in lists or not student:
        return None
    sides: tuple[Any, Any] = (student, teacher)
    # none, one for all pairs, or one a pair
    by_pair = [type(of) in lists for of in (weight, bias)]
    weights: Any = weight if by_pair[0] else (weight,)
    biases: Any = bias if by_pair[1] else (bias,)
    given = (*map(len, (*sides, weights, biases)), *by_pair, *options)
    return look_of_options(given, (*sides[0], *sides[1], *weights, *biases, mask))


def check_hidden(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor] | None,
    mask: Tensor | None,
    tokens: str,
    backend: str,
) -> str:
    """Everything fits, or an error says what does not; returns the back end."""
    check_pairs(student, teacher)
    _check_list("weight", weight, len(student))
    _check_list("bias", bias, len(student))
    weights, biases = as_list(weight), as_list(bias)
    if biases and not weights:
        raise ValueError("bias is given without weight; give a weight or leave the bias out")
    for pair, (student_state, teacher_state) in enumerate(zip(student, teacher, strict=True)):
        check_tensor(f"student[{pair}]", student_state, "batch, tokens, student_width")
        check_tensor(f"teacher[{pair}]", teacher_state, "batch, tokens, teacher_width")
        check_device(f"student[{pair}]", student_state, student[0].device)
        check_device(f"teacher[{pair}]", teacher_state, student[0].device)
        check_frozen(f"teacher[{pair}]", teacher_state)
        first = tuple(student[0].shape[:2])
        for name, value in (("student", student_state), ("teacher", teacher_state)):
            if tuple(value.shape[:2]) != first:
                raise ValueError(
                    f"{name}[{pair}] has batch and tokens {tuple(value.shape[:2])}; expected "
                    f"those of student[0], {first}; run both models on the same batch"
                )
        widths = (teacher_state.shape[-1], student_state.shape[-1])
        if not weights and widths[0] != widths[1]:
            raise ValueError(
                f"pair {pair}: the student is {widths[1]} wide and the teacher {widths[0]}; "
                f"give a weight [{widths[0]}, {widths[1]}]"
            )
        _check_trained("weight", weights, pair, widths, student[0].device)
        _check_trained("bias", biases, pair, widths[:1], student[0].device)
    batch, length, _ = student[0].shape
    device = student[0].device
    check_mask("mask", mask, batch, length, device)
    check_choice("tokens", tokens, get_args(Tokens))
    return resolve_backend(backend, device, accumulator(*student, *teacher, *weights, *biases))


def as_list(value: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """No tensor, one for all pairs, or one a pair."""
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)


def _check_list(name: str, value: object, pairs: int) -> None:
    if value is None or isinstance(value, Tensor):
        return
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} must be a tensor, a list with one tensor a pair, or None, "
            f"got {type(value).__name__}"
        )
    if len(value) != pairs:
        raise ValueError(
            f"{name} has {len(value)} tensors for {pairs} pairs; give one a pair, "
            "or a single tensor for all"
        )


def _check_trained(
    name: str, values: list[Tensor], pair: int, shape: tuple[int, ...], device: torch.device
) -> None:
    if not values:
        return
    index = pair % len(values)
    label = name if len(values) == 1 else f"{name}[{index}]"
    dims = "teacher_width, student_width" if len(shape) == 2 else "teacher_width"
    check_tensor(label, values[index], dims)
    check_device(label, values[index], device)
    if tuple(values[index].shape) != shape:
        raise ValueError(
            f"{label} has shape {tuple(values[index].shape)}; expected [{dims}] = "
            f"{list(shape)} for pair {pair}"
        )
    if values[index].dtype != values[0].dtype:
        raise TypeError(f"{label} is {values[index].dtype} and {name}[0] is {values[0].dtype}")


def check_options(
    kind: str, temperature: float, scale_by_temperature: bool, beta: float, skew: float
) -> None:
    check_choice("kind", kind, get_args(LogitsDivergenceKind))
    check_flag("scale_by_temperature", scale_by_temperature)
    check_temperature(temperature)
    if kind == "mse" and temperature != 1.0:
        raise ValueError(
            f"kind='mse' compares raw logits, got temperature={temperature}; leave it at 1 and "
            "weight the loss instead"
        )
    _check_teacher_share("beta", beta, (0.0, 1.0))
    # all of the mixture the teacher's would leave nothing to learn
    _check_teacher_share("skew", skew, (0.0,))


def _check_teacher_share(name: str, teacher_share: float, ends: tuple[float, ...]) -> None:
    """The teacher's part of a mixture: one of `ends`, or far enough from both."""
    if not is_number(teacher_share):
        raise TypeError(f"{name} must be a float, got {type(teacher_share).__name__}")
    if teacher_share not in ends and not LEAST_SHARE <= teacher_share <= 1.0 - LEAST_SHARE:
        allowed = " or ".join(f"{end:g}" for end in ends)
        raise ValueError(
            f"{name} is {teacher_share}; expected {allowed}, or a part of the mixture from "
            f"{LEAST_SHARE:g} to {1.0 - LEAST_SHARE:g}, whose rest fp32 does not lose"
        )


def look_at_logits(
    student: object,
    teacher: object,
    mask: Tensor | None,
    labels: Tensor | None,
    *options: object,
) -> Look | None:
    """None if the checks must see for themselves."""
    sides: list[Any] = [
        side if type(side) is LogitsHead else (side,) for side in (student, teacher)
    ]
    # what a head multiplies, and the numbers of its finish
    tensors, numbers = [side[:3] for side in sides], [side[3:] for side in sides]
    given = ("logits", *map(len, tensors), *numbers[0], *numbers[1], *options)
    return look_of_options(given, (*tensors[0], *tensors[1], mask, labels))


def check_logits(
    student: LogitsHead | Tensor,
    teacher: LogitsHead | Tensor,
    kind: str,
    mask: Tensor | None,
    labels: Tensor | None,
) -> None:
    """Everything fits, or an error says what does not."""
    student_side, teacher_side = _logits_side("student", student), _logits_side("teacher", teacher)
    device, lead = student_side[0].device, student_side[0].shape[:-1]
    for side, tensors in (("student", student_side), ("teacher", teacher_side)):
        for name, tensor in _named_tensors(side, tensors):
            check_device(name, tensor, device)
            if side == "teacher":
                check_frozen(name, tensor)
    if teacher_side[0].shape[:-1] != lead:
        raise ValueError(
            f"teacher has leading dimensions {tuple(teacher_side[0].shape[:-1])}; expected those "
            f"of the student, {tuple(lead)}; run both models on the same batch"
        )
    _check_row_entries("mask", mask, torch.bool, "a bool tensor, True at valid rows", lead, device)
    _check_row_entries(
        "labels", labels, torch.int64, "an int64 tensor of token or class ids", lead, device
    )
    shared = min(
        side[1].shape[0] if side[1:] else side[0].shape[-1] for side in (student_side, teacher_side)
    )
    if shared == 1 and kind != "mse":
        raise ValueError(
            f"kind={kind!r} needs at least two shared columns, got 1, whose softmax is always 1; "
            "use kind='mse' for regression"
        )


def _named_tensors(side: str, tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors of a side under the names that messages use."""
    if len(tensors) == 1:
        return [(side, tensors[0])]
    names = [f"{side}.{field}" for field in LogitsHead._fields]
    return list(zip(names, tensors, strict=False))


def _logits_side(name: str, side: object) -> list[Tensor]:
    if isinstance(side, Tensor):
        _check_logits_states(name, side, "vocab")
        return [side]
    if not isinstance(side, LogitsHead):
        raise TypeError(
            f"{name} must be a LogitsHead(hidden, weight, bias) or a tensor of logits, "
            f"got {type(side).__name__}"
        )
    _check_scale(f"{name}.scale", side.scale, "1")
    check_softcap(f"{name}.softcap", side.softcap)
    _check_logits_states(f"{name}.hidden", side.hidden, "width")
    check_tensor(f"{name}.weight", side.weight, "vocab, width")
    if side.weight.shape[1] != side.hidden.shape[-1]:
        raise ValueError(
            f"{name}.weight has shape {tuple(side.weight.shape)} and {name}.hidden is "
            f"{side.hidden.shape[-1]} wide; expected [vocab, {side.hidden.shape[-1]}]"
        )
    if side.bias is None:
        return [side.hidden, side.weight]
    check_tensor(f"{name}.bias", side.bias, "vocab")
    if side.bias.shape[0] != side.weight.shape[0]:
        raise ValueError(
            f"{name}.bias has {side.bias.shape[0]} entries and {name}.weight "
            f"{side.weight.shape[0]} rows; give one entry for each row"
        )
    return [side.hidden, side.weight, side.bias]


def _check_logits_states(name: str, value: object, last: str) -> None:
    """Floats `[rows, last]` or `[batch, tokens, last]`."""
    if isinstance(value, Tensor) and value.ndim == 2:
        check_tensor(name, value, f"rows, {last}")
    else:
        check_tensor(name, value, f"batch, tokens, {last}")


def _check_row_entries(
    name: str,
    value: object,
    dtype: torch.dtype,
    expected: str,
    lead: torch.Size,
    device: torch.device,
) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != dtype:
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is {given}; expected {expected}, so convert it first")
    if value.shape != lead:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected one entry a row, {tuple(lead)}"
        )
    check_device(name, value, device)
