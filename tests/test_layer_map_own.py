"""Layer maps from outside: what their classes may give, and when what else is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastkd.errors import UserError
from fastkd.layer_map import (
    LayerMap,
    Link,
    MapConfig,
    Progress,
    checked_links,
    foresee,
    make_layer_map,
    register_layer_map,
)
from fastkd.layer_map.one_to_one import FixedMap

pytestmark = pytest.mark.usefixtures("own_registries")


def map_of(links: Any, **more: Any) -> type[LayerMap]:
    """A class whose links are those of a function of the step."""
    members = {"links": lambda self, moment: links(moment.step), "__module__": __name__, **more}
    return type("OwnMap", (LayerMap,), members)


def made(kind: type[LayerMap]) -> LayerMap:
    register_layer_map("own")(kind)
    return make_layer_map(MapConfig(kind="own"), 2, 4)


def two(step: int) -> tuple[Link, ...]:
    return (Link(1, (1,)), Link(2, (4,), 0.5))


MOVING = {"moves": True, "teacher_depth": 4, "labels": lambda self: ("2-*",)}
PLACE = f"{__name__}.OwnMap"
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "raises": (
        lambda step: {}["nowhere"],
        {},
        f"layer_map: {PLACE} fails (KeyError: 'nowhere', line ",
    ),
    "of a class of its own": (
        lambda step: Path("/nowhere/weights").read_text(),
        {},
        f"layer_map: {PLACE} fails (FileNotFoundError: [Errno 2] No such file or directory: ",
    ),
    "nothing": (lambda step: None, {}, f"layer_map: {PLACE}.links at the start gives None; give a"),
    "pairs": (
        lambda step: [(1, 2)],
        {},
        f"layer_map: {PLACE}.links at the start gives (1, 2); expected Link(student, teachers,",
    ),
    "a layer for a tuple": (
        lambda step: (Link(1, 2),),  # type: ignore[arg-type]
        {},
        f"layer_map: {PLACE}.links at the start gives Link(student=1, teachers=2, weight=1.0); exp",
    ),
    "no teachers": (
        lambda step: (Link(1, (1,)), Link(2, ())),
        {},
        f"layer_map: {PLACE}.links at the start gives Link(student=2, teachers=(), weight=1.0); e",
    ),
    "a negative weight": (
        lambda step: (Link(2, (4,), -1.0),),
        {},
        f"layer_map: {PLACE}.links at the start gives the weight -1.0; give a number from 0",
    ),
    "a truth for a weight": (
        lambda step: (Link(2, (4,), True),),
        {},
        f"layer_map: {PLACE}.links at the start gives the weight True; give a number from 0",
    ),
    "no number": (
        lambda step: (Link(2, (4,), float("nan")),),
        {},
        f"layer_map: {PLACE}.links at the start gives the weight nan; give a number from 0",
    ),
    "a layer too many": (
        lambda step: (Link(3, (4,)),),
        {},
        "layer_map names student layer 3, but the student's layers are 1 to 2",
    ),
    "half a layer": (
        lambda step: (Link(1, (1.5,)),),  # type: ignore[arg-type]
        {},
        "layer_map names teacher layer 1.5, but the teacher's layers are 1 to 4",
    ),
    "no links": (lambda step: (), {}, "layer_map own matches no layer of a 2-layer student and a"),
    "moves is a method": (
        two,
        {"moves": lambda self: True},
        f"layer_map: {PLACE}.moves is a method, expected true or false; write it with @property",
    ),
    "deeper than the teacher": (
        two,
        {"teacher_depth": 5},
        f"layer_map: {PLACE}.teacher_depth gives 5, but the teacher's layers are 1 to 4",
    ),
    "one label for two": (
        two,
        {"labels": lambda self: ("1-*", "1-*")},
        f"layer_map: {PLACE}.labels gives 1-*, 1-* for 2 links; give each a name of its own",
    ),
    "sources for one layer": (
        two,
        {"sources": lambda self: (1,)},
        f"layer_map: {PLACE}.sources gives 1 layers; give one for each of the student's 2",
    ),
    "an unknown source": (
        two,
        {"sources": lambda self: (1, 0)},
        f"layer_map: {PLACE}.sources gives 0, but the teacher's layers are 1 to 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_run_could_use_is_refused_where_it_is_made(name: str) -> None:
    links, more, expected = REFUSED[name]
    with pytest.raises(UserError) as refused:
        made(map_of(links, **more))
    assert str(refused.value).startswith(expected)


LATER: dict[str, tuple[Any, dict[str, Any], str]] = {
    "moves without a word": (
        lambda step: (Link(2, (4 if step < 2 else 1,)),),
        {},
        f"layer_map: {PLACE}.links at step 2, epoch 0 names other teacher layers than at the start,"
        " but its moves is false; make moves true",
    ),
    "walks off": (
        lambda step: (Link(2, (4 if step < 2 else 99,)),),
        MOVING,
        "layer_map names teacher layer 99 at step 2, epoch 0, but the teacher's layers are 1 to 4",
    ),
    "deeper than it said": (
        lambda step: (Link(2, (2 if step < 2 else 4,)),),
        {**MOVING, "teacher_depth": 2},
        f"layer_map: {PLACE} names teacher layer 4 at step 2, epoch 0, but its teacher_depth is 2",
    ),
    "grows": (
        lambda step: tuple(Link(s, (s,)) for s in range(1, 2 if step < 2 else 3)),
        {**MOVING, "labels": lambda self: ("1-*",)},
        f"layer_map: {PLACE}.links at step 2, epoch 0 names student layers 1, 2, but 1 at the s",
    ),
    "begins to mix": (
        lambda step: (Link(2, (4,) if step < 2 else (1, 4)),),
        MOVING,
        f"layer_map: {PLACE}.links at step 2, epoch 0 names student layers 2, but 2 at the start; "
        "give the same ones at every moment, each with one teacher layer or with several",
    ),
    "raises later": (
        lambda step: (Link(2, ((4, 3)[step],)),),
        MOVING,
        f"layer_map: {PLACE} fails (IndexError: tuple index out of range, line ",
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_links_are_seen_at_every_moment_and_at_some_before_the_run(name: str) -> None:
    links, more, expected = LATER[name]
    layers = made(map_of(links, **more))
    foresee(layers, 2)
    for ask in (lambda: checked_links(layers, Progress(2)), lambda: foresee(layers, 3)):
        with pytest.raises(UserError) as refused:
            ask()
        assert str(refused.value).startswith(expected)


def test_lists_and_numbers_of_numpy_are_links_too() -> None:
    given: Any = [np.int64(3)]
    layers = made(map_of(lambda step: [Link(1, given, np.float64(0.5))]))
    assert checked_links(layers, Progress(7)) == (Link(1, (3,), 0.5),)
    assert layers.pairs == ((1, 3),)


class NoSection(LayerMap):
    """Its options are no section."""

    class Config:
        """None."""

    def links(self, moment: Progress) -> tuple[Link, ...]:
        return two(moment.step)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Path, r"the layer map own is <class '[\w.]*Path'>; give a subclass of fastkd's LayerMap"),
        (two, "the layer map own is <function two at .*>; give a subclass of fastkd's LayerMap"),
        (FixedMap, r"fastkd\.layer_map\.one_to_one\.FixedMap has no targets; give it one"),
        (NoSection, r"[\w.]*NoSection\.Config is no subclass of MapConfig; make it one"),
    ],
)
def test_a_class_that_is_no_whole_map_is_refused_where_it_is_registered(
    kind: Any, expected: str
) -> None:
    with pytest.raises(UserError, match=f"^{expected}$"):
        register_layer_map("own")(kind)


def test_a_decorator_without_a_name_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"a layer map can't be called <class .*; give a name, as in"
    ):
        register_layer_map(Alternating)  # type: ignore[arg-type]


def test_options_that_the_class_has_no_field_for_are_one_line() -> None:
    class Config(MapConfig):
        shift: int = 0

    register_layer_map("own")(map_of(two, Config=Config))
    with pytest.raises(UserError, match=r"^layer_map: .*OwnMap fails \(TypeError: .*'shift'"):
        make_layer_map(Config(kind="own"), 2, 4)


@dataclass(frozen=True)
class Alternating(LayerMap):
    """Layers 1 and 4 in turn."""

    def links(self, moment: Progress) -> tuple[Link, ...]:
        return (Link(2, (1 if moment.step % 2 else 4,)),)

    @property
    def moves(self) -> bool:
        return True

    def labels(self) -> tuple[str, ...]:
        return ("2-*",)


def test_the_last_step_of_a_run_is_seen_before_it() -> None:
    layers = made(map_of(lambda step: (Link(2, (4 if step < 6 else 5,)),), **MOVING))
    foresee(layers, 6)
    with pytest.raises(UserError, match="teacher layer 5"):
        foresee(layers, 7)


def test_a_map_that_moves_and_says_so_moves() -> None:
    layers = made(Alternating)
    foresee(layers, 1000)
    found = [checked_links(layers, Progress(step))[0].teachers for step in range(4)]
    assert found == [(4,), (1,), (4,), (1,)]
