"""Try a model once before a run: whether it can be captured, and what its queries see.

A flag or a setting says what a model should do; here the model is run and what its attention was
given and what it made of that are compared with what the losses will assume.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fastkd_kernels import AttentionState
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.capture.blocks import check_single_stack, find_blocks, no_cache
from fastkd.capture.recording import Capture, capture
from fastkd.capture.routing import AttentionCall, listening, route_attention, runnable
from fastkd.errors import FOREIGN_ERRORS, UserError
from fastkd.heads import check_head, last_layer

# of the largest value: fp64 next to a softmax in fp32
_TOLERANCE = 1e-4
# query rows that are compared, spread over the sequence
_ROWS = 16
_TAKE_OUT = "leave losses.attention and losses.relations out"


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one model's attention and their sizes."""

    heads: int
    kv_heads: int
    key_size: int
    """Of queries and keys."""
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
    """Of the layers with local attention: keys fewer than so many tokens away are seen."""
    unknown: str | None = None
    """Why what a query sees is nothing that an op can be told."""
    differs: str | None = None
    """Why the model's probabilities are not the softmax of its captured queries and keys."""
    shapes: tuple[AttentionShape, ...] = ()
    """Of the queries, keys and values of its layers, each once."""


def try_model(
    model: PreTrainedModel,
    tokens: int = 8,
    field: str = "data.block_size",
    *,
    attention: bool = True,
    hidden: bool = True,
) -> AttentionTraits:
    """Run a model on sequences of a length, and see that what a run needs of it can be captured.

    Args:
        model: on one device; it is routed where its attention is wanted, and stays so.
        tokens: length of the longest sequence that it will read.
        field: of the recipe, which says so.
        attention: whether queries and keys are captured; without, the traits say nothing.
        hidden: whether hidden states are captured.

    Raises:
        UserError: the model has no positions for so many tokens, reads no tokens, changes when its
            attention is captured, or has a block whose attention or hidden state can't be.
    """
    check_single_stack(model)
    check_positions(model, tokens, field)
    layers = range(len(find_blocks(model)) + 1) if attention or hidden else range(0)
    traits = AttentionTraits()
    training = model.training
    model.eval()
    with torch.no_grad(), runnable(model), _padded(model):
        inputs = _inputs(model, tokens)
        plain = _try(model, inputs, layers, f"{tokens} tokens", field)
        _check_states(model, plain, inputs)
        if last_layer(model) is not None:
            check_head(model)
        if attention:
            traits = _try_attention(model, inputs, plain)
    model.train(training)
    if attention:
        # `runnable` put the name of before back
        route_attention(model)
    return traits


def check_positions(model: PreTrainedModel, tokens: int, field: str) -> None:
    """See that a model has positions for `tokens` tokens, which `field` of the recipe asks for.

    Raises:
        UserError: it has fewer; rotary models would run on, where they were never trained.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    # models without a limit may say -1
    if positions is not None and 0 < positions < tokens:
        raise UserError(
            f"{type(model).__name__} has {positions} positions, but {field} is {tokens}; give a "
            "smaller one"
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Tokens that a model embeds.

    Raises:
        UserError: it has no table of embeddings.
    """
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor):
        raise UserError(
            f"{type(model).__name__} has no table of token embeddings; give a model of tokens"
        )
    return int(weight.shape[0])


def _inputs(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """Two sequences, of which the second is half padding; of a vision model two images."""
    config, name = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (2, getattr(config, "num_channels", 3), height, width)
        images = torch.randn(shape, generator=generator)
        return {"pixel_values": images.to(model.device, model.dtype)}
    if model.main_input_name != "input_ids":
        raise UserError(
            f"{name} reads {model.main_input_name}, expected a model of tokens or images of one "
            "size; give one of those"
        )
    # any id but the padding, whose positions some models don't count
    known = torch.arange(vocabulary_size(model))
    pad = getattr(config, "pad_token_id", None)
    pad = None if pad == -1 else pad
    known = known[known != (-1 if pad is None else pad)]
    ids = known[torch.randint(len(known), (2, tokens), generator=generator)]
    mask = torch.ones_like(ids)
    mask[1, (tokens + 1) // 2 :] = 0
    if pad is not None:
        ids[mask == 0] = pad
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _try(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Collection[int],
    what: str,
    field: str = "",
) -> Capture:
    with capture(model, hidden=layers) as states:
        try:
            model(**inputs, **no_cache(model))
        except UserError:
            raise
        except FOREIGN_ERRORS as error:
            smaller = f"; give a smaller {field}, or another model" if field else ""
            raise UserError(
                f"{type(model).__name__} can't read {what} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}){smaller}"
            ) from error
    return states


@contextmanager
def _padded(model: PreTrainedModel) -> Iterator[None]:
    """A decoder's classifier that knows of no padding reads one sequence at a time."""
    config: Any = model.config
    unset = getattr(config, "pad_token_id", 0) is None
    if unset:
        config.pad_token_id = -1
    try:
        yield
    finally:
        if unset:
            config.pad_token_id = None


def _check_states(model: PreTrainedModel, states: Capture, inputs: Mapping[str, Tensor]) -> None:
    ids, width = inputs.get("input_ids"), model.config.hidden_size
    mask = inputs.get("attention_mask")
    for layer, state in states.hidden.items():
        expected = (state.shape[:2] if ids is None else ids.shape) + (width,)
        if state.shape != expected:
            raise UserError(
                f"{type(model).__name__}: the state of layer {layer} is {list(state.shape)}, "
                f"expected {list(expected)} (batch, tokens, hidden_size); give a model whose "
                "blocks hand on one vector a token"
            )
        counted = state if mask is None else state[mask.bool()]
        if not bool(counted.isfinite().all()):
            raise UserError(
                f"{type(model).__name__}: the state of layer {layer} is not finite; give a model "
                "whose weights are whole, or a precision in which they are"
            )


def _try_attention(
    model: PreTrainedModel, inputs: dict[str, Tensor], plain: Capture
) -> AttentionTraits:
    name = type(model).__name__
    route_attention(model)
    blocks = find_blocks(model)
    found: dict[int, list[_Seen]] = {number: [] for number in range(1, len(blocks) + 1)}
    mask = inputs.get("attention_mask")
    with ExitStack() as stack:
        for number, block in enumerate(blocks, start=1):
            stack.enter_context(listening(block, _Prober(found[number], mask)))
        routed = _try(model, inputs, plain.hidden, "its inputs with its attention captured")
    for layer, state in plain.hidden.items():
        if not _near(routed.hidden[layer], state, None if mask is None else mask.bool()):
            raise UserError(
                f"{name}: layer {layer} gives other states when its attention is captured, as a "
                "model does that chooses its masks by the attention's name, or draws numbers; "
                f"{_TAKE_OUT}"
            )
    missing = [layer for layer, calls in found.items() if not calls]
    if missing:
        raise UserError(
            f"{name}: the attention of layers {missing} does not go through transformers' "
            f"attention interface, so it can't be captured; {_TAKE_OUT}, or give a model whose "
            "attention does"
        )
    several = [layer for layer, calls in found.items() if len(calls) > 1]
    if several:
        raise UserError(
            f"{name}: layers {several} attend more than once in a forward pass, so their attention "
            f"can't be captured; {_TAKE_OUT}"
        )
    return _traits(name, {layer: calls[0] for layer, calls in found.items()})


@dataclass(frozen=True)
class _Seen:
    """What one call of an attention function showed."""

    causal: bool
    window: int | None
    regular: bool
    """Whether causality and window say all of what a query sees."""
    error: float
    """Of the output that captured states imply, as a part of the largest value."""
    given: tuple[str, ...]
    """Tensors that the function was given besides."""
    shape: AttentionShape


class _Prober:
    """A listener that compares a call with what its captured state implies."""

    def __init__(self, found: list[_Seen], mask: Tensor | None) -> None:
        self._found = found
        self._mask = mask

    def __call__(self, call: AttentionCall) -> None:
        query, key = call.state.query, call.state.key
        tokens = query.shape[2]
        given = tuple(n for n, v in call.given.items() if isinstance(v, Tensor) and n != "s_aux")
        assert call.state.value is not None
        sizes = query.shape[1], key.shape[1], key.shape[3], call.state.value.shape[3]
        shape = AttentionShape(*sizes)
        if key.shape[2] != tokens:
            self._found.append(_Seen(False, None, False, torch.inf, given, shape))
            return
        visible = _visible(call, tokens)
        causal = not bool(visible.triu(1).any())
        distance = _distances(tokens, visible.device).abs()
        window = int(distance[visible].max()) + 1 if visible.any() else 0
        told = _told(tokens, causal, window, visible.device)
        kept = None if window >= tokens else window
        error = _error(call, told, self._mask)
        self._found.append(_Seen(causal, kept, torch.equal(visible, told), error, given, shape))


def _visible(call: AttentionCall, tokens: int) -> Tensor:
    """Keys that the queries of the first sequence see, bool [tokens, tokens]."""
    mask = call.mask
    if mask is None:
        every = torch.ones(tokens, tokens, dtype=torch.bool, device=call.state.query.device)
        return every.tril() if call.causal_flag else every
    seen = mask[0] if mask.dtype == torch.bool else mask[0] > torch.finfo(mask.dtype).min / 2
    return seen.flatten(0, -3).any(dim=0).expand(tokens, tokens)


def _distances(tokens: int, device: torch.device) -> Tensor:
    """Of every key from every query, [tokens, tokens]."""
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


def _near(given: Tensor, expected: Tensor, valid: Tensor | None) -> bool:
    """Whether two states [batch, tokens, width] agree where nothing is padding."""
    difference = (given.float() - expected.float()).abs()
    if valid is not None:
        difference = difference * valid.unsqueeze(-1)
    eps = torch.finfo(expected.dtype).eps
    return bool(difference.max() <= 64 * eps * expected.float().abs().max())


def _traits(name: str, found: Mapping[int, _Seen]) -> AttentionTraits:
    causal = [layer for layer, seen in found.items() if seen.causal]
    if causal and len(causal) < len(found):
        raise UserError(
            f"{name}: layers {causal} see earlier tokens only and the others all, so no loss can "
            f"treat them alike; {_TAKE_OUT}"
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
    return AttentionTraits(bool(causal), windows, unknown, differs, shapes)
