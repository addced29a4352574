"""Take what the losses need from a model's forward pass, without ever asking for attention maps.

set_attention -> try_model (-> route_attention) -> capture
"""

from fastkd.capture.attention_traits import AttentionShape, AttentionTraits
from fastkd.capture.blocks import at_depth, find_blocks, no_cache
from fastkd.capture.recording import Capture, capture
from fastkd.capture.routing import route_attention, set_attention
from fastkd.capture.trial import try_model, vocabulary_size

__all__ = [
    "AttentionShape",
    "AttentionTraits",
    "Capture",
    "at_depth",
    "capture",
    "find_blocks",
    "no_cache",
    "route_attention",
    "set_attention",
    "try_model",
    "vocabulary_size",
]
