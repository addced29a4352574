"""What a pass leaves, and where the hooks that record it write to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastkd_kernels import AttentionState, LogitsHead
from torch import Tensor


@dataclass
class Capture:
    """What one forward pass left, by layer number (`fastkd.layer_map` has the convention).

    `attention[i]` holds query [batch, heads, tokens, head_dim], key and value
    [batch, kv_heads, tokens, head_dim], the scale of block i and, where it has them, the cap of its
    scores and its sinks, after rotary embeddings and before grouped heads are repeated; `hidden[i]`
    is [batch, tokens, width]. `logits` is what the head gave, [batch, outputs], or of a language
    model what its last layer would have multiplied.
    """

    attention: dict[int, AttentionState] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | LogitsHead | None = None
    outputs: Tensor | None = None
    modules: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Slot:
    """Where hooks write to; `None` between passes, when they leave the model alone."""

    states: Capture | None = None


def missing(states: Capture, wanted: Mapping[str, Any]) -> list[str]:
    """What of the keyword arguments of `capture` a pass did not leave, in words."""
    found = []
    for kind, given in (("attention", states.attention), ("hidden", states.hidden)):
        layers: Collection[int] = wanted.get(kind, ())
        gone = sorted(set(layers) - given.keys())
        if gone:
            found.append(f"{kind} of layers {gone}")
    found += [f"module {path}" for path in wanted.get("modules", ()) if path not in states.modules]
    for kind in ("logits", "outputs"):
        if wanted.get(kind) and getattr(states, kind) is None:
            found.append(kind)
    return found
