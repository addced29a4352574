"""What the queries of a model see: read from what its attention is given and makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from fastkd_kernels import AttentionState
from torch import Tensor

from fastkd.capture.cheap_products import CheapProducts
from fastkd.capture.routing import AttentionCall
from fastkd.errors import UserError

TAKE_OUT = "leave losses.attention and losses.relations out"
# of the largest value: fp64 next to a softmax in fp32
_TOLERANCE = 1e-4
# query rows that are compared, spread over the sequence
_ROWS = 16


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one model's attention and their sizes."""

    heads: int
    kv_heads: int
    key_size: int
    """Width of a head's queries and keys."""
    value_size: int

    def width(self, letter: str, relation: str) -> int:
        """Numbers that a token's vectors have in a relation, all heads together.

        Args:
            letter: q, k or v.
            relation: qq, kk, vv or qk; in qk every key head stands once for each of its queries.
        """
        heads = self.heads if letter == "q" or relation == "qk" else self.kv_heads
        return heads * (self.value_size if letter == "v" else self.key_size)


@dataclass(frozen=True)
class AttentionTraits:
    """What the queries of a model see, and whether its probabilities are those of its captures."""

    causal: bool = False
    """Whether queries see no later key."""
    windows: Mapping[int, int] = field(default_factory=dict)
    """Windows of the layers with local attention: keys fewer than so many tokens away are seen."""
    unknown: str | None = None
    """Why what a query sees is nothing that an op can be told."""
    differs: str | None = None
    """Why the model's probabilities are not the softmax of its captured queries and keys."""
    shapes: tuple[AttentionShape, ...] = ()
    """Shapes of the queries, keys and values of its layers, each once."""
    sinks: frozenset[int] = frozenset()
    """Layers with attention sinks."""


@dataclass(frozen=True)
class Seen:
    """What one call of an attention function showed."""

    causal: bool
    window: int | None
    regular: bool
    """Whether causality and window say all of what a query sees."""
    error: float
    """Error of the output that captured states imply, as a part of the largest value."""
    given: tuple[str, ...]
    """Tensors that the function was given besides."""
    shape: AttentionShape
    sinks: bool


class Errors:
    """How far what attention functions make is from what captured states imply.

    Args:
        mask: of padding, [batch, tokens].
        cheap: the open context of a pass in which only the numbers that are asked for here are the
            model's: few tokens have shown what attends to all, and the others are asked once for
            each kind.
    """

    def __init__(self, mask: Tensor | None, cheap: CheapProducts | None) -> None:
        self._mask, self._cheap = mask, cheap
        self._known: dict[tuple[bool, int, bool], float] = {}

    def of(self, call: AttentionCall, told: Tensor, kind: tuple[bool, int, bool]) -> float:
        """As a part of the largest value.

        Args:
            call: of the attention function.
            told: keys that queries see for all that an op knows, bool [tokens, tokens].
            kind: whether it is causal, the window, and whether they say all.
        """
        if self._cheap is None:
            return _error(call, told, self._mask)
        _, window, regular = kind
        if regular and window >= len(told):
            return 0.0
        if kind not in self._known:
            with self._cheap.exact():
                self._known[kind] = _error(call, told, self._mask)
        return self._known[kind]


class Prober:
    """A listener that compares a call with what its captured state implies."""

    def __init__(self, found: list[Seen], errors: Errors) -> None:
        self._found = found
        self._errors = errors

    def __call__(self, call: AttentionCall) -> None:
        query, key = call.state.query, call.state.key
        tokens = query.shape[2]
        given = tuple(name for name, value in call.given.items() if _is_bias(name, value))
        assert call.state.value is not None
        sizes = query.shape[1], key.shape[1], key.shape[3], call.state.value.shape[3]
        shape, sinks = AttentionShape(*sizes), call.state.sinks is not None
        if key.shape[2] != tokens:
            self._found.append(Seen(False, None, False, torch.inf, given, shape, sinks))
            return
        visible = _visible(call, tokens)
        causal = not bool(visible.triu(1).any())
        distance = _distances(tokens, visible.device).abs()
        window = int(distance[visible].max()) + 1 if visible.any() else 0
        told = _told(tokens, causal, window, visible.device)
        kept = None if window >= tokens else window
        regular = torch.equal(visible, told)
        error = self._errors.of(call, told, (causal, window, regular))
        self._found.append(Seen(causal, kept, regular, error, given, shape, sinks))


def _is_bias(name: str, value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and name != "s_aux"


def _visible(call: AttentionCall, tokens: int) -> Tensor:
    """Keys that the queries of the first sequence see, bool [tokens, tokens]."""
    mask = call.mask
    if mask is None:
        every = torch.ones(tokens, tokens, dtype=torch.bool, device=call.state.query.device)
        return every.tril() if call.causal_flag else every
    seen = mask[0] if mask.dtype == torch.bool else mask[0] > torch.finfo(mask.dtype).min / 2
    return seen.flatten(0, -3).any(dim=0).expand(tokens, tokens)


def _distances(tokens: int, device: torch.device) -> Tensor:
    """Distance of every key from every query, [tokens, tokens]."""
    position = torch.arange(tokens, device=device)
    return position - position[:, None]


def _told(tokens: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """What an op takes a query to see, bool [tokens, tokens]."""
    distance = _distances(tokens, device)
    seen = distance.abs() < window
    return seen & (distance <= 0) if causal else seen


def _error(call: AttentionCall, visible: Tensor, mask: Tensor | None) -> float:
    """How far the softmax of the captured state is from what the attention function made."""
    state = call.state
    assert state.value is not None
    tokens = visible.shape[0]
    # maps of long sequences in eager attention take enough in fp32
    dtype = torch.float64 if tokens <= 1024 else torch.float32
    rows = torch.linspace(0, tokens - 1, min(tokens, _ROWS), device=visible.device).long()
    seen = visible[rows].expand(len(state.query), 1, -1, -1)
    counted = torch.ones(len(state.query), 1, len(rows), 1, dtype=torch.bool, device=rows.device)
    if mask is not None:
        seen = seen & mask[:, None, None].bool()
        counted = mask[:, None, rows, None].bool()
    probabilities = _probabilities(state, rows, seen, dtype)
    value = _repeated(state.value, state.query).to(dtype)
    implied = probabilities @ value
    made = call.again(dtype).to(dtype).transpose(1, 2)[:, :, rows]
    if made.shape != implied.shape:
        return torch.inf
    worst = ((implied - made).abs() * counted).max() / value.abs().max().clamp(min=1e-30)
    return float(worst) if bool(worst.isfinite()) else torch.inf


def _probabilities(state: AttentionState, rows: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention of some query rows as the ops define it, [batch, heads, rows, tokens]."""
    key = _repeated(state.key, state.query).to(dtype)
    scores = state.scale * state.query[:, :, rows].to(dtype) @ key.mT
    if state.softcap is not None:
        scores = state.softcap * torch.tanh(scores / state.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if state.sinks is not None:
        sinks = state.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    # a query that sees nothing is not compared
    return scores.softmax(dim=-1)[..., : key.shape[2]].nan_to_num()


def _repeated(state: Tensor, query: Tensor) -> Tensor:
    return state.repeat_interleave(query.shape[1] // state.shape[1], dim=1)


def traits_of(name: str, found: Mapping[int, Seen]) -> AttentionTraits:
    causal = [layer for layer, seen in found.items() if seen.causal]
    if causal and len(causal) < len(found):
        raise UserError(
            f"{name}: layers {causal} see earlier tokens only and the others all, so no loss can "
            f"treat them alike; {TAKE_OUT}"
        )
    odd = [layer for layer, seen in found.items() if not seen.regular]
    far = {layer: seen for layer, seen in found.items() if seen.error > _TOLERANCE}
    unknown = differs = None
    if odd:
        unknown = (
            f"{name}: layers {odd} attend in chunks or blocks, which is neither all tokens nor a "
            "window around each"
        )
    if far:
        given = sorted({tensor for seen in far.values() for tensor in seen.given})
        worst = max(seen.error for seen in far.values())
        reason = f", as it adds {', '.join(given)}" if given else ""
        differs = (
            f"{name}: the attention of layers {list(far)} is not the softmax of its queries and "
            f"keys (its output is off by {worst:.2g} of the largest value{reason})"
        )
    windows = {layer: seen.window for layer, seen in found.items() if seen.window is not None}
    shapes = tuple(dict.fromkeys(seen.shape for seen in found.values()))
    sinks = frozenset(layer for layer, seen in found.items() if seen.sinks)
    return AttentionTraits(bool(causal), windows, unknown, differs, shapes, sinks)
