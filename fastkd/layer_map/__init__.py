"""Which teacher layers each student layer learns from, when, and with what weight.

`base.py` has what every mapping answers and counts the layers once for the whole project. One file
holds the mappings of one kind: `one_to_one.py`, `many_to_one.py` (blends, and all with all),
`random_map.py`, `pairs.py`. `sections.py` is what a recipe may say, `factory.py` builds the mapping
from it, `registry.py` takes mappings from outside, `checks.py` sees what these give. `emd.py`
solves the transport of BERT-EMD.

A mapping is a pure function of two depths, its options and the moment: it knows no model and no
tensor, and loads no torch.
"""

from fastkd.layer_map.base import (
    CONVENTION,
    LayerMap,
    Link,
    Progress,
)
from fastkd.layer_map.checks import checked_links, follows_epochs, foresee
from fastkd.layer_map.emd import Transport
from fastkd.layer_map.factory import make_layer_map
from fastkd.layer_map.many_to_one import AttentionMap, TransportMap
from fastkd.layer_map.registry import register_layer_map
from fastkd.layer_map.sections import MapConfig, MapKind

__all__ = [
    "CONVENTION",
    "AttentionMap",
    "LayerMap",
    "Link",
    "MapConfig",
    "MapKind",
    "Progress",
    "Transport",
    "TransportMap",
    "checked_links",
    "follows_epochs",
    "foresee",
    "make_layer_map",
    "register_layer_map",
]
