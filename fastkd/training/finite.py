"""Numbers that are not finite: which weights hold them, and whether it was the teacher.

A loss that is NaN says nothing of where it came from. The teacher never changes, so what it made of
a batch can be made again: where its states are finite, the student made the NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.capture import Capture
from fastkd.data.tasks.metrics import TEACHER_REMEDY
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.training.teacher import NoTeacher, TeacherRunner
from fastkd.types import Inputs, teacher_inputs


def check_weights(model: nn.Module, name: str) -> None:
    """See that every weight of a model that was read is finite.

    Args:
        model: as it was loaded, not yet sharded.
        name: field of the recipe and its value.

    Raises:
        UserError: naming the first weight that isn't.
    """
    broken = [key for key, weight in model.named_parameters() if not _is_finite(weight)]
    if broken:
        more = f" and {len(broken) - 1} more weights" if len(broken) > 1 else ""
        raise UserError(
            f"{name}: {broken[0]}{more} not finite (NaN or inf); give a model whose weights are "
            "whole"
        )


def broken_weights(engine: Any, ranks: Ranks) -> list[str]:
    """What of an engine's weights and of its optimiser's state is not finite; collective.

    A second moment that overflowed holds its weight still for ever, so it counts too.
    """
    weights = dict(_weights(engine.module))
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = optimizer.param_groups
    # how many pieces these are may differ between ranks
    parts = {
        "the master weights": [m.detach() for group in groups for m in group["params"]],
        "the moments of the optimiser": [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.is_floating_point()
        ],
    }
    names = [*weights, *parts]
    flags = [~torch.isfinite(weight).all() for weight in weights.values()]
    flags += [_any_broken(tensors) for tensors in parts.values()]
    counts = ranks.sum(torch.stack([flag.to(ranks.device) for flag in flags]).float()).tolist()
    return [name for name, count in zip(names, counts, strict=True) if count]


def teacher_fault(
    teacher: TeacherRunner | NoTeacher, batches: Iterable[Inputs], ranks: Ranks
) -> str | None:
    """The first state of the teacher that is not finite on some inputs, `None` if all are.

    Collective: every rank gives equally many batches, on its device.
    """
    if isinstance(teacher, NoTeacher):
        return None
    counts: dict[str, Tensor] = {}
    for inputs in batches:
        mask = teacher_inputs(inputs).get("attention_mask")
        for name, state in _states(teacher(inputs), mask):
            flag = (~torch.isfinite(state).all()).float()
            counts[name] = counts.get(name, torch.zeros_like(flag)) + flag
    if not counts:
        return None
    found = ranks.sum(torch.stack(list(counts.values())).to(ranks.device)).tolist()
    return next((name for name, count in zip(counts, found, strict=True) if count), None)


def blame(fault: str | None, teacher: TeacherRunner | NoTeacher, remedy: str) -> str:
    """Who made a number that is not finite, and what to do.

    Args:
        fault: from `teacher_fault`.
        teacher: of the run.
        remedy: what to do where the teacher did not make it.
    """
    if fault is not None:
        return f"the teacher made it ({fault} of the teacher is not finite); {TEACHER_REMEDY}"
    if isinstance(teacher, NoTeacher):
        return f"the model made it; {remedy}"
    return f"the student or the loss made it (the teacher's states are finite); {remedy}"


def first_broken(values: Mapping[str, Any]) -> str | None:
    """The first number that is not finite among values and sections of values, by name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            inner = first_broken(value)
            if inner is not None:
                return f"{name}.{inner}"
        elif isinstance(value, float) and not math.isfinite(value):
            return name
    return None


def _is_finite(tensor: Tensor) -> bool:
    # what is quantised to a byte is looked at through its scales
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return True
    return bool(torch.isfinite(tensor).all())


def _any_broken(tensors: list[Tensor]) -> Tensor:
    flags = [~torch.isfinite(tensor).all() for tensor in tensors]
    return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool)


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What this rank holds of the weights."""
    for name, weight in module.named_parameters():
        # under ZeRO-3 a parameter is empty outside the forward, and its shard stands beside it
        shard = getattr(weight, "ds_tensor", None)
        yield name, weight.detach() if shard is None else shard


def _states(found: Capture, mask: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """What a teacher left, without the places that its mask leaves out."""
    for layer, state in sorted(found.hidden.items()):
        yield f"the state of layer {layer}", _seen(state, mask)
    for layer, attention in sorted(found.attention.items()):
        for name in ("query", "key", "value"):
            state = getattr(attention, name)
            if state is not None:
                yield f"the {name} of layer {layer}", _seen(state.transpose(1, 2), mask)
    logits = found.logits
    if isinstance(logits, Tensor):
        yield "the output", logits
    elif logits is not None:
        yield "the state below the head", _seen(logits.hidden, mask)
    if found.outputs is not None:
        yield "the last state", _seen(found.outputs, mask)
    if found.embedding is not None:
        yield "the embedding", found.embedding


def _seen(state: Tensor, mask: Tensor | None) -> Tensor:
    fits = mask is not None and state.shape[:2] == mask.shape
    return state[mask.bool()] if fits and mask is not None else state
