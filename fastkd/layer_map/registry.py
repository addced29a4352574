"""Layer maps by name that come from outside; fastkd's own stand in `factory.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastkd.errors import UserError
from fastkd.layer_map.base import LayerMap
from fastkd.layer_map.checks import map_errors
from fastkd.layer_map.sections import MAP_SECTIONS, MapConfig, is_map_name
from fastkd.plugins import note_source, place_of
from fastkd.section import check_annotations

_MAPS: dict[str, type[LayerMap]] = {}

M = TypeVar("M", bound=type[LayerMap])


def register_layer_map(name: str) -> Callable[[M], M]:
    """Make a subclass of `LayerMap` known as `layer_map: NAME` of a recipe; a decorator.

    A map with options is a dataclass with further fields and has a `Config`, made from `MapConfig`,
    that says what a recipe may give for them: `layer_map: {kind: NAME, ...}`.

    Raises:
        UserError: another map has that name, or it is none; or what is decorated is no whole map.
    """
    if not isinstance(name, str):
        raise UserError(
            f"a layer map can't be called {name!r:.100}; give a name, as in "
            '@register_layer_map("middle")'
        )

    def register(layer_map: M) -> M:
        _check_class(name, layer_map)
        known = _MAPS.get(name)
        again = known is not None and place_of(known) == place_of(layer_map)
        if not again and (is_map_name(name) or not name.isidentifier()):
            raise UserError(
                f"a layer map can't be called {name!r}, which is taken or no word; give "
                f"{place_of(layer_map)} another name"
            )
        _MAPS[name] = layer_map
        note_source(layer_map)
        MAP_SECTIONS[name] = _section(layer_map)
        return layer_map

    return register


def _check_class(name: str, layer_map: Any) -> None:
    """See that what is to be registered is a mapping with all that it takes.

    Raises:
        UserError: it isn't, and what it lacks.
    """
    if not (isinstance(layer_map, type) and issubclass(layer_map, LayerMap)):
        raise UserError(
            f"the layer map {name} is {layer_map!r:.100}; give a subclass of fastkd's LayerMap"
        )
    place = place_of(layer_map)
    # set by what makes such classes, which type doesn't tell
    lacking = sorted(getattr(layer_map, "__abstractmethods__", ()))
    if lacking:
        raise UserError(f"{place} has no {', '.join(lacking)}; give it one")
    config = _section(layer_map)
    if not (isinstance(config, type) and issubclass(config, MapConfig)):
        raise UserError(f"{place}.Config is no subclass of MapConfig; make it one")
    check_annotations(f"{place}.Config", config)


def _section(layer_map: Any) -> Any:
    return getattr(layer_map, "Config", MapConfig)


def build_registered(config: MapConfig, student_layers: int, teacher_layers: int) -> LayerMap:
    """The map that a section asks for.

    Raises:
        UserError: its class can't be made with these options.
    """
    options, kind = config.model_dump(exclude={"kind"}), _MAPS[config.kind]
    with map_errors(kind):
        return kind(student_layers, teacher_layers, **options)
