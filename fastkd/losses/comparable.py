"""Which layers' attention can be compared, and the divergence of those that can."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from fastkd_kernels import AttentionDivergenceKind, AttentionState
from torch import Tensor

from fastkd.errors import UserError
from fastkd.layer_map import AttentionMap, Link, Progress, checked_links
from fastkd.losses.base import Loss, ModelPair

if TYPE_CHECKING:
    from fastkd.capture import AttentionTraits, Capture

States = list[AttentionState]
DivergenceKind: TypeAlias = AttentionDivergenceKind


def by_window(
    loss: Loss,
    student: Capture,
    teacher: Capture,
    divergence: Callable[[States, States, int | None], Tensor],
) -> Tensor:
    """Losses [links] of a divergence that is called once for each window of local attention."""
    groups: dict[int | None, list[int]] = {}
    for number, link in enumerate(loss.links):
        groups.setdefault(_window(loss.shared.pair, link), []).append(number)
    losses: dict[int, Tensor] = {}
    for window, members in groups.items():
        links = [loss.links[number] for number in members]
        found = divergence(
            [student.attention[link.student] for link in links],
            [teacher.attention[link.teachers[0]] for link in links],
            window,
        )
        losses |= dict(zip(members, found.unbind(), strict=True))
    return torch.stack([losses[number] for number in range(len(loss.links))])


def _window(pair: ModelPair, link: Link) -> int | None:
    """How far the two layers of a link attend; `None` is all tokens.

    Raises:
        UserError: not equally far.
    """
    student, teacher = pair.windows[0].get(link.student), pair.windows[1].get(link.teachers[0])
    if student != teacher:
        raise UserError(
            f"student layer {link.student} attends within {student or 'all'} tokens and teacher "
            f"layer {link.teachers[0]} within {teacher or 'all'}, so their probabilities can't "
            "be compared; give a layer_map that pairs local layers with local ones"
        )
    return student


def check_links(loss: Loss, *, sinks: bool) -> None:
    """See that the layers of a loss's links can be compared, before data is read.

    Raises:
        UserError: naming the first pair that can't.
    """
    pair = loss.shared.pair
    for link in loss.links:
        _window(pair, link)
        have = link.student in pair.sinks[0], link.teachers[0] in pair.sinks[1]
        if sinks and have[0] != have[1]:
            raise UserError(
                f"student layer {link.student} has {'' if have[0] else 'no '}attention sinks and "
                f"teacher layer {link.teachers[0]} has {'' if have[1] else 'no '}sinks, so their "
                "probabilities can't be compared; give a layer_map that pairs such layers with "
                "each other"
            )


def check_blend(loss: Loss, *, averages: bool) -> None:
    """See that a loss can learn from several teacher layers at once, where its map mixes them.

    Args:
        loss: with the map in force.
        averages: whether it can learn from their mean.

    Raises:
        UserError: it can't.
    """
    layer_map = loss.layer_map
    if layer_map is None:
        return
    blended = any(len(link.teachers) > 1 for link in checked_links(layer_map, Progress()))
    by_attention = isinstance(layer_map, AttentionMap)
    if not blended or (averages and not by_attention):
        return
    name = "attention" if by_attention else "mean_target"
    raise UserError(
        f"layer_map {name} mixes several teacher layers into one target, which "
        f"losses.{loss.name} of this kind can't compare with; give the term a layer_map of its "
        "own, such as mean_loss"
    )


def check_directions(name: str, traits: tuple[AttentionTraits, AttentionTraits]) -> None:
    """See that two models both are causal, or both bidirectional.

    Raises:
        UserError: one of each.
    """
    if traits[0].causal != traits[1].causal:
        kinds = ["causal" if found.causal else "bidirectional" for found in traits]
        raise UserError(
            f"the student is {kinds[0]} and the teacher {kinds[1]}, so their attention can't be "
            f"compared; leave losses.{name} out, and all other losses of attention or relations"
        )


def check_visible(traits: tuple[AttentionTraits, AttentionTraits], use: str) -> None:
    """See that an op can be told what the queries of two models see.

    Raises:
        UserError: it can't; `use` says what to do.
    """
    for found in traits:
        if found.unknown:
            raise UserError(f"{found.unknown}; {use}")
