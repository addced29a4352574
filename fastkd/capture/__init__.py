"""Take what the losses need from a model's forward pass, without ever asking for attention maps.

    set_attention -> try_model (-> route_attention) -> capture

`recording.py` has `capture`, the one context in which hooks stand, of one thread at a time
(`alone.py`): attention (`routing.py`), states of blocks (`blocks.py`), what a head gives or reads
(`lm_head.py`), the states after the final norm (`last_state.py`), and any submodule by its path
(`modules.py`). `compiled.py` does the same of a model that `torch.compile` compiles, `recompute.py`
makes attention again from the hidden states below it. `packed_pass.py` and `packed_attention.py`
let a model read sequences that follow each other in one row. `trial.py` runs a model once before a
run and sees that all of it can be captured, `packed_trial.py` that it reads such rows, both in eval
mode (`modes.py`); `attention_traits.py` says what its queries see, `cheap_products.py` how that is
seen of long sequences in little time.
`facts.py` answers what others ask of a model: its positions, whether it sees ahead.
`trial_inputs.py` is what a model is run on to find any of this out.

It knows no loss and no recipe.
"""

from fastkd.capture.attention_traits import AttentionShape, AttentionTraits
from fastkd.capture.blocks import at_depth, capture_keywords, find_blocks
from fastkd.capture.compiled import CompiledCapture
from fastkd.capture.facts import (
    hands_on_last_block,
    sees_ahead,
    usable_positions,
)
from fastkd.capture.modes import evaluating
from fastkd.capture.modules import find_module
from fastkd.capture.packed_pass import leave_types_out, reading
from fastkd.capture.packed_trial import try_packed
from fastkd.capture.recompute import RecomputedAttention, try_recomputing
from fastkd.capture.recording import capture
from fastkd.capture.routing import is_routed, route_attention, set_attention
from fastkd.capture.states import Capture, PaddedStates
from fastkd.capture.trial import try_model
from fastkd.capture.trial_inputs import vocabulary_size

__all__ = [
    "AttentionShape",
    "AttentionTraits",
    "Capture",
    "CompiledCapture",
    "PaddedStates",
    "RecomputedAttention",
    "at_depth",
    "capture",
    "capture_keywords",
    "evaluating",
    "find_blocks",
    "find_module",
    "hands_on_last_block",
    "is_routed",
    "leave_types_out",
    "reading",
    "route_attention",
    "sees_ahead",
    "set_attention",
    "try_model",
    "try_packed",
    "try_recomputing",
    "usable_positions",
    "vocabulary_size",
]
