"""Take what the losses need from a model's forward pass, without ever asking for attention maps.

    set_attention -> try_model (-> route_attention) -> capture

`recording.py` has `capture`, the one context in which hooks stand: attention (`routing.py`), states
of blocks (`blocks.py`), what a head gives or reads (`lm_head.py`), the states after the final norm,
and any submodule by its path (`modules.py`). `compiled.py` does the same of a model that
`torch.compile` compiles, `recompute.py` makes attention again from the hidden states below it.
`trial.py` runs a model once before a run and sees
that all of it can be captured; `attention_traits.py` says what its queries see.

This folder may import `errors`, `types`, transformers, and of the kernels the types of what is
captured alone. It knows no loss and no recipe.
"""

from fastkd.capture.attention_traits import AttentionShape, AttentionTraits
from fastkd.capture.blocks import at_depth, find_blocks, no_cache
from fastkd.capture.compiled import CompiledCapture
from fastkd.capture.modules import find_module
from fastkd.capture.recompute import RecomputedAttention, try_recomputing
from fastkd.capture.recording import capture
from fastkd.capture.routing import route_attention, set_attention
from fastkd.capture.states import Capture
from fastkd.capture.trial import try_model, vocabulary_size

__all__ = [
    "AttentionShape",
    "AttentionTraits",
    "Capture",
    "CompiledCapture",
    "RecomputedAttention",
    "at_depth",
    "capture",
    "find_blocks",
    "find_module",
    "no_cache",
    "route_attention",
    "set_attention",
    "try_model",
    "try_recomputing",
    "vocabulary_size",
]
