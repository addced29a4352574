"""What a pass leaves, and where the hooks that record it write to."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastkd_kernels import AttentionState, LogitsHead
from torch import Tensor

from fastkd.packed_row import PackedRow


@dataclass
class Capture:
    """What one forward pass left, by layer number (`fastkd.layer_map` has the convention).

    `attention[i]` holds query [batch, heads, tokens, head_dim], key and value
    [batch, kv_heads, tokens, head_dim], the scale of block i and, where it has them, the cap of its
    scores and its sinks, after rotary embeddings and before grouped heads are repeated; `hidden[i]`
    is [batch, tokens, width]. `logits` is what the head gave, [batch, outputs] or, of one that
    classifies tokens or finds spans, [batch, tokens, outputs], or of a language model what its last
    layer would have multiplied. `embedding`, one vector a sequence [batch, dim], was made of
    `outputs` and stands in their place where nothing else reads these.
    """

    attention: dict[int, AttentionState] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | LogitsHead | None = None
    outputs: Tensor | None = None
    modules: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None


@dataclass
class Slot:
    """Where hooks write to; `None` between passes, when they leave the model alone."""

    states: Capture | None = None
    thread: int | None = None
    """Whose passes are recorded; `None` for those of any thread, as of a compiled pass."""

    @property
    def heard(self) -> Capture | None:
        """Where a hook that runs now writes to, if it is heard."""
        if self.thread is None or self.thread == threading.get_ident():
            return self.states
        return None


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


class PaddedStates:
    """What was captured of a packed pass, as of a padded one; each state is padded once."""

    def __init__(self, captured: Capture, row: PackedRow, *, values: bool) -> None:
        """Take down what is to be padded.

        Args:
            captured: of embeddings and blocks in one row.
            row: the row.
            values: whether anything reads the values of attention.
        """
        self._captured = captured
        self._row = row
        self._values = values
        self._attention: dict[int, AttentionState] = {}
        self._hidden: dict[int, Tensor] = {}

    def of(self, wanted: Mapping[str, Any]) -> Capture:
        """The states that a loss reads, as its `layers` name them."""
        found = self._captured
        return Capture(
            attention={n: self._padded_attention(n) for n in wanted.get("attention", ())},
            hidden={n: self._padded_hidden(n) for n in wanted.get("hidden", ())},
            logits=found.logits,
            outputs=found.outputs,
            modules={
                path: self._row.padded_module(found.modules[path])
                for path in wanted.get("modules", ())
            },
            embedding=found.embedding,
        )

    def _padded_attention(self, layer: int) -> AttentionState:
        if layer not in self._attention:
            state = self._captured.attention[layer]
            value = state.value
            if value is not None:
                value = self._row.padded(value, 2) if self._values else None
            self._attention[layer] = state._replace(
                query=self._row.padded(state.query, 2),
                key=self._row.padded(state.key, 2),
                value=value,
            )
        return self._attention[layer]

    def _padded_hidden(self, layer: int) -> Tensor:
        if layer not in self._hidden:
            self._hidden[layer] = self._row.padded(self._captured.hidden[layer])
        return self._hidden[layer]
