"""Which teacher layer each student layer learns from."""

from fastkd.layer_map.base import (
    CONVENTION,
    LayerMap,
    Link,
    Progress,
)
from fastkd.layer_map.emd import Transport
from fastkd.layer_map.factory import make_layer_map
from fastkd.layer_map.many_to_one import AttentionMap, TransportMap
from fastkd.layer_map.sections import MapKind

__all__ = [
    "CONVENTION",
    "AttentionMap",
    "LayerMap",
    "Link",
    "MapKind",
    "Progress",
    "Transport",
    "TransportMap",
    "make_layer_map",
]
