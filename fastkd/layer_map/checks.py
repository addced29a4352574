"""Whether a mapping gives what every mapping must, as anyone may have written its class.

What would train on other layers than its labels say, or stop a run in the middle, is refused:
where the mapping is made as far as it can be seen there, and of a class from outside at every
moment that the run comes to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from fastkd.errors import UserError
from fastkd.layer_map.base import LayerMap, Link, Progress
from fastkd.plugins import is_built_in, place_of, plugin_errors

START = Progress()


def checked_links(layers: LayerMap, moment: Progress) -> tuple[Link, ...]:
    """The links in force at a moment.

    Raises:
        UserError: a class from outside fails, or gives what is no set of links of these models, or
            other ones than it gave at the start and says that it may.
    """
    kind = type(layers)
    if is_built_in(kind):
        return layers.links(moment)
    with map_errors(kind):
        found = _read_links(layers, moment)
        if moment == START:
            return found
        first = _read_links(layers, START)
        where = f"layer_map: {place_of(kind)}.links at {_said(moment)} names"
        if [_shape(link) for link in found] != [_shape(link) for link in first]:
            raise UserError(
                f"{where} student layers {_listed(found)}, but {_listed(first)} at the start; give "
                "the same ones at every moment, each with one teacher layer or with several"
            )
        if not layers.moves and [link.teachers for link in found] != [f.teachers for f in first]:
            raise UserError(
                f"{where} other teacher layers than at the start, but its moves is false; make "
                "moves true, teacher_depth the deepest layer, and labels names that hold for all"
            )
        return found


def foresee(layers: LayerMap, steps: int) -> None:
    """See that a mapping gives links at moments of a run, before it begins: a few of them, as they
    may be millions.

    Raises:
        UserError: as `checked_links`.
    """
    if not is_built_in(type(layers)):
        for step in {*(1 << n for n in range(steps.bit_length())), steps - 1}:
            if 0 <= step < steps:
                checked_links(layers, Progress(step))


def follows_epochs(layers: LayerMap) -> bool:
    """Whether links change with the passes over the data, as seen of the first few.

    Raises:
        UserError: as `checked_links`.
    """
    moments = (Progress(0, epoch) for epoch in range(8))
    return layers.moves and len({checked_links(layers, moment) for moment in moments}) > 1


def check_map(layers: LayerMap, called: object) -> None:
    """See that a mapping that was just made is whole.

    Args:
        layers: the mapping.
        called: what the recipe says.

    Raises:
        UserError: it compares nothing, names a layer that a model doesn't have, or is of a class
            from outside that gives no such thing as its base says.
    """
    kind = type(layers)
    if not is_built_in(kind):
        with map_errors(kind):
            _check_answers(layers)
    if not layers.pairs:
        raise UserError(
            f"layer_map {called} matches no layer of a {layers.student_layers}-layer student and a "
            f"{layers.teacher_layers}-layer teacher; give at least one pair"
        )
    _check_inside(layers, layers.links(START), START)


@contextmanager
def map_errors(kind: Any) -> Iterator[None]:
    """What a class from outside raises, in one line."""
    with plugin_errors("layer_map", kind):
        yield


def _check_answers(layers: LayerMap) -> None:
    place = place_of(type(layers))
    if not isinstance(layers.moves, bool):
        raise UserError(
            f"layer_map: {place}.moves is a {type(layers.moves).__name__}, expected true or false; "
            "write it with @property"
        )
    links = _read_links(layers, START)
    if links:
        _check_layers(layers, "teacher_depth", [layers.teacher_depth], layers.teacher_layers)
    labels = list(layers.labels())
    texts = all(isinstance(label, str) for label in labels)
    if not texts or len(labels) != len(links) or len(set(labels)) != len(labels):
        raise UserError(
            f"layer_map: {place}.labels gives {', '.join(map(str, labels))} for {len(links)} "
            "links; give each a name of its own"
        )
    sources = list(layers.sources())
    if len(sources) != layers.student_layers:
        raise UserError(
            f"layer_map: {place}.sources gives {len(sources)} layers; give one for each of the "
            f"student's {layers.student_layers}"
        )
    _check_layers(layers, "sources", sources, layers.teacher_layers)
    layers.rows()


def _read_links(layers: LayerMap, moment: Progress) -> tuple[Link, ...]:
    """What a class from outside gives, as the tuples that it should be."""
    where = f"layer_map: {place_of(type(layers))}.links at {_said(moment)} gives"
    given = layers.links(moment)
    if not isinstance(given, Iterable):
        raise UserError(f"{where} {given!r:.100}; give a tuple of Link(student, teachers, weight)")
    found = []
    for link in given:
        teachers = getattr(link, "teachers", None)
        if not isinstance(link, Link) or not isinstance(teachers, tuple | list) or not teachers:
            raise UserError(
                f"{where} {link!r:.100}; expected Link(student, teachers, weight) with a tuple of "
                "at least one teacher layer, as in Link(1, (2,))"
            )
        weight = link.weight
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise UserError(f"{where} the weight {weight!r:.100}; give a number from 0")
        found.append(link._replace(teachers=tuple(teachers)))
    _check_inside(layers, found, moment)
    return tuple(found)


def _check_inside(layers: LayerMap, links: Iterable[Link], moment: Progress) -> None:
    """See that both models have the layers of some links, and that none lies deeper than said."""
    depths = {"student": layers.student_layers, "teacher": layers.teacher_layers}
    at = "" if moment == START else f" at {_said(moment)}"
    for link in links:
        for side, depth in depths.items():
            for layer in [link.student] if side == "student" else link.teachers:
                if not _is_layer(layer, depth):
                    raise UserError(
                        f"layer_map names {side} layer {layer}{at}, but the {side}'s layers are 1 "
                        f"to {depth}"
                    )
        deepest = max(link.teachers)
        if moment != START and deepest > layers.teacher_depth:
            raise UserError(
                f"layer_map: {place_of(type(layers))} names teacher layer {deepest}{at}, but its "
                f"teacher_depth is {layers.teacher_depth}; make that the deepest layer that it may "
                "ever name"
            )


def _check_layers(layers: LayerMap, what: str, given: Iterable[object], depth: int) -> None:
    for layer in given:
        if not _is_layer(layer, depth):
            raise UserError(
                f"layer_map: {place_of(type(layers))}.{what} gives {layer!r:.100}, but the "
                f"teacher's layers are 1 to {depth}"
            )


def _is_layer(layer: object, depth: int) -> bool:
    whole = isinstance(layer, Integral) and not isinstance(layer, bool)
    return whole and 1 <= int(layer) <= depth  # type: ignore[call-overload]


def _shape(link: Link) -> tuple[int, bool]:
    """What of a link holds at every moment: losses are chosen by whether it mixes layers."""
    return link.student, len(link.teachers) > 1


def _listed(links: Iterable[Link]) -> str:
    return ", ".join(str(link.student) for link in links) or "none"


def _said(moment: Progress) -> str:
    return "the start" if moment == START else f"step {moment.step}, epoch {moment.epoch}"
