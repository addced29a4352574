"""The section of the layer map."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import BeforeValidator

from fastkd.layer_map import MapKind


def _known_map(value: object) -> object:
    layers = isinstance(value, list | tuple) and all(type(v) is int and v >= 0 for v in value)
    if not layers and value not in get_args(MapKind):
        raise ValueError(
            f"expected {', '.join(get_args(MapKind))} or a list with one teacher layer for each "
            f"student layer, 0 for none (given {value!r})"
        )
    return value


Layers = Annotated[MapKind | tuple[int, ...], BeforeValidator(_known_map)]
