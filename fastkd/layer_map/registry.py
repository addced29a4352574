"""Layer maps by name that come from outside; fastkd's own stand in `factory.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fastkd.errors import UserError
from fastkd.layer_map.base import LayerMap
from fastkd.layer_map.sections import MAP_SECTIONS, MapConfig, is_map_name
from fastkd.plugins import place_of

_MAPS: dict[str, type[LayerMap]] = {}

M = TypeVar("M", bound=type[LayerMap])


def register_layer_map(name: str) -> Callable[[M], M]:
    """Make a subclass of `LayerMap` known as `layer_map: NAME` of a recipe; a decorator.

    A map with options is a dataclass with further fields and has a `Config`, made from `MapConfig`,
    that says what a recipe may give for them: `layer_map: {kind: NAME, ...}`.

    Raises:
        UserError: another map has that name, or it is none.
    """

    def register(layer_map: M) -> M:
        known = _MAPS.get(name)
        again = known is not None and place_of(known) == place_of(layer_map)
        if not again and (is_map_name(name) or not name.isidentifier()):
            raise UserError(
                f"a layer map can't be called {name!r}, which is taken or no word; give "
                f"{place_of(layer_map)} another name"
            )
        _MAPS[name] = layer_map
        MAP_SECTIONS[name] = getattr(layer_map, "Config", MapConfig)
        return layer_map

    return register


def build_registered(config: MapConfig, student_layers: int, teacher_layers: int) -> LayerMap:
    """The map that a section asks for."""
    options = config.model_dump(exclude={"kind"})
    return _MAPS[config.kind](student_layers, teacher_layers, **options)
