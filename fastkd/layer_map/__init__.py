"""Which teacher layer each student layer learns from."""

from fastkd.layer_map.choose import make_layer_map
from fastkd.layer_map.many import AttentionMap, TransportMap
from fastkd.layer_map.mapping import CONVENTION, LayerMap, Link, Moment
from fastkd.layer_map.transport import Transport
from fastkd.recipe.layers import MapKind

__all__ = [
    "CONVENTION",
    "AttentionMap",
    "LayerMap",
    "Link",
    "MapKind",
    "Moment",
    "Transport",
    "TransportMap",
    "make_layer_map",
]
