"""Several teacher layers as the target of one student layer: `sum_j w_j c_j Q_j K_j^T`.

That sum is one product of wider heads, `X = [w_1 c_1 Q_1, w_2 c_2 Q_2, ...]` with
`Y = [K_1, K_2, ...]`, so an op on single layers takes it as one more head size. The road not taken:
a list of layers in every kernel, whose tables and loops all single layers would pay for.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..checks import SCALES, check_pairs, check_teacher, is_number
from ..types import AttentionState, TeacherLayers, TeacherWeights


def weighted_teachers(
    student: Sequence[AttentionState],
    teacher: Sequence[TeacherLayers],
    weights: TeacherWeights | None,
) -> list[AttentionState]:
    """One state a pair whose scores are the target; checks everything on the way.

    A pair with one layer keeps its tensors; several are copied side by side, in memory linear in
    the tokens. They stay in their own dtype where all `w_j c_j` have one magnitude (an even average
    over heads of one size) and become fp32 otherwise, so that no weight is rounded into a half.
    """
    check_pairs(student, teacher)
    if weights is not None and not isinstance(weights, (list, tuple)):
        raise TypeError(
            "teacher_weights must be a list or tuple with one entry a pair, "
            f"got {type(weights).__name__}"
        )
    if weights is not None and len(weights) != len(student):
        raise ValueError(
            f"teacher_weights has {len(weights)} entries for {len(student)} pairs; give each pair "
            "its weights, or None for an even average"
        )
    teachers = []
    for pair, (student_state, entry) in enumerate(zip(student, teacher, strict=True)):
        name = f"teacher[{pair}]"
        several = isinstance(entry, (list, tuple)) and not isinstance(entry, AttentionState)
        layers: Sequence[Any] = entry if several else [entry]
        if not layers:
            raise ValueError(f"{name} is an empty list; give at least one AttentionState")
        for index, layer in enumerate(layers):
            layer_name = f"{name}[{index}]" if several else name
            check_teacher(pair, student_state, layer_name, layer, first=student[0])
        given = None if weights is None else weights[pair]
        teachers.append(_joined(name, layers, _checked_weights(pair, given, len(layers))))
    return teachers


def _checked_weights(pair: int, given: Sequence[float] | None, layers: int) -> list[float]:
    name = f"teacher_weights[{pair}]"
    if given is None:
        return [1.0 / layers] * layers
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"{name} must be a list of floats or None for an even average, "
            f"got {type(given).__name__}"
        )
    if len(given) != layers:
        raise ValueError(
            f"{name} has {len(given)} weights for {layers} teacher layers; give one for each"
        )
    for weight in given:
        if not is_number(weight) or not math.isfinite(weight):
            raise ValueError(f"{name} has {weight!r}; expected finite numbers")
    if not any(given):
        raise ValueError(f"{name} is all zeros; give at least one layer another weight")
    return [float(weight) for weight in given]


def _joined(
    name: str, layers: Sequence[AttentionState], weights: Sequence[float]
) -> AttentionState:
    first = layers[0]
    for index, layer in enumerate(layers):
        if layer.query.dtype != first.query.dtype:
            raise TypeError(
                f"{name}[{index}] is {layer.query.dtype} and {name}[0] is {first.query.dtype}; "
                "cast the layers of one pair to one dtype"
            )
        if layer.key.shape[1] != first.key.shape[1]:
            raise ValueError(
                f"{name}[{index}] has {layer.key.shape[1]} key heads and {name}[0] has "
                f"{first.key.shape[1]}; the layers of one pair need the same number"
            )
    factors = [
        (layer, weight * float(layer.scale))
        for layer, weight in zip(layers, weights, strict=True)
        if weight
    ]
    scale = max(abs(factor) for _, factor in factors)
    smallest, largest = SCALES
    if not smallest <= scale <= largest:
        raise ValueError(
            f"the largest of teacher_weights of {name}, times its layer's scale, is {scale:g}; "
            f"expected a size from {smallest:g} to {largest:g}, which fp32 holds"
        )
    if len(factors) == 1:
        layer, factor = factors[0]
        return layer._replace(scale=factor)
    dtype = first.query.dtype
    if any(abs(factor) != scale for _, factor in factors):
        dtype = torch.promote_types(dtype, torch.float32)
    queries = [
        layer.query.to(dtype) if factor == scale else layer.query.to(dtype) * (factor / scale)
        for layer, factor in factors
    ]
    keys = [layer.key.to(dtype) for layer, _ in factors]
    return AttentionState(torch.cat(queries, -1), torch.cat(keys, -1), None, scale)
