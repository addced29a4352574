"""Try a model once before a run: whether it can be captured, and what its queries see.

A flag or a setting says what a model should do; here the model is run and what its attention was
given and what it made of that are compared with what the losses will assume. A few tokens show what
it computes; at full length, where windows and chunks and missing positions show, it runs once more
without most of its arithmetic (`cheap_products.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.capture.alone import alone
from fastkd.capture.attention_traits import (
    TAKE_OUT,
    AttentionTraits,
    Errors,
    Prober,
    Seen,
    traits_of,
)
from fastkd.capture.blocks import capture_keywords, check_single_stack, find_blocks
from fastkd.capture.cheap_products import CheapProducts
from fastkd.capture.facts import usable_positions
from fastkd.capture.lm_head import check_head, last_layer
from fastkd.capture.modes import evaluating
from fastkd.capture.recording import CalledAgain, capture
from fastkd.capture.routing import listening, route_attention, routed, runnable
from fastkd.capture.states import Capture
from fastkd.capture.trial_inputs import padded, trial_inputs
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line

# tokens that are read with all of a model's arithmetic; what depends on length is seen without
_FEW = 32
# standard deviation of what stands in for parameters that have learned
_NOISE = 0.1


def try_model(
    model: PreTrainedModel,
    tokens: int = 8,
    field: str = "data.block_size",
    *,
    attention: bool = True,
    hidden: bool = True,
    outputs: bool = False,
) -> AttentionTraits:
    """Run a model on sequences of a length, and see that what a run needs of it can be captured.

    Args:
        model: on one device; it is routed where its attention is wanted, and where that changes
            nothing, and stays so.
        tokens: length of the longest sequence that it will read.
        field: of the recipe, which says so.
        attention: whether queries and keys are captured; without, the traits say nothing.
        hidden: whether hidden states are captured.
        outputs: whether the states after the final norm are captured.

    Raises:
        UserError: the model has no positions for so many tokens, reads no tokens, changes when its
            attention is captured, has a block whose attention or hidden state can't be, skips
            blocks while it trains, or hands on no last hidden state.
    """
    check_single_stack(model)
    _check_positions(model, tokens, field)
    try_on = partial(_try_on, model, field, attention=attention, hidden=hidden, outputs=outputs)
    few = min(tokens, _FEW)
    with alone(model), evaluating(model), torch.no_grad(), runnable(model), padded(model):
        running = model.config._attn_implementation
        try:
            inputs = trial_inputs(model, few)
            traits, stays_routed = try_on(inputs, f"{few} tokens")
            if few < tokens and "input_ids" in inputs:
                model.config._attn_implementation = running
                with CheapProducts() as cheap:
                    inputs = trial_inputs(model, tokens)
                    long, stays = try_on(inputs, f"{tokens} tokens", cheap)
                differs, unknown = traits.differs or long.differs, traits.unknown or long.unknown
                traits = replace(long, differs=differs, unknown=unknown)
                stays_routed = stays_routed and stays
        except UserError:
            # a model that can't be captured is left as it came
            model.config._attn_implementation = running
            raise
    if stays_routed:
        # `runnable` put the name of before back
        route_attention(model)
    return traits


def _try_on(
    model: PreTrainedModel,
    field: str,
    inputs: dict[str, Tensor],
    what: str,
    cheap: CheapProducts | None = None,
    *,
    attention: bool,
    hidden: bool,
    outputs: bool,
) -> tuple[AttentionTraits, bool]:
    """What the queries of a model see of some inputs, and whether it can run routed.

    Args:
        model: in eval mode.
        field: as `try_model`.
        inputs: of the trial.
        what: they are, for messages.
        cheap: the open context where the numbers are not the model's, so that it is only seen what
            they are not needed for.
        attention: as `try_model`.
        hidden: as `try_model`.
        outputs: as `try_model`.

    Raises:
        UserError: as `try_model`.
    """
    layers = range(len(find_blocks(model)) + 1) if attention or hidden else range(0)
    deepest = _deepest(model)
    traits = AttentionTraits()
    try:
        heard = {*layers} if deepest is None else {*layers, deepest}
        plain = _try(model, inputs, heard, what, field, outputs=outputs)
    except CalledAgain:
        if layers:
            raise
        # nobody reads its states
        deepest = None
        plain = _try(model, inputs, layers, what, field, outputs=outputs)
    if cheap is None:
        _check_states(model, plain, inputs, layers)
        if layers and any(parameter.requires_grad for parameter in model.parameters()):
            _check_no_skipping(model)
        if hidden and not attention:
            _check_repeats(model, inputs, layers)
        if last_layer(model) is not None:
            _check_head(model, inputs)
    if outputs:
        _check_outputs(model, plain, inputs)
    if attention:
        traits = _try_attention(model, inputs, plain, cheap)
    return traits, attention or (
        deepest is not None and _takes_routes(model, inputs, deepest, plain.hidden.get(deepest))
    )


def _check_positions(model: PreTrainedModel, tokens: int, field: str) -> None:
    """See that a model has positions for `tokens` tokens, which `field` of the recipe asks for.

    Raises:
        UserError: it has fewer; rotary models would run on, where they were never trained.
    """
    positions = usable_positions(model)
    if positions is not None and positions < tokens:
        raise UserError(
            f"{type(model).__name__} has {positions} positions, but {field} is {tokens}; give a "
            "smaller one"
        )


def _check_no_skipping(model: PreTrainedModel) -> None:
    """See that a model that trains runs all of its blocks in every pass.

    Raises:
        UserError: it skips some at random (LayerDrop), which have no states then.
    """
    rates: dict[str, Any] = {
        f"{path}.layerdrop".lstrip("."): vars(module)["layerdrop"]
        for path, module in model.named_modules()
        if "layerdrop" in vars(module)
    }
    # modules that hold no rate of their own look it up
    rates = rates or {"config.layerdrop": getattr(model.config, "layerdrop", 0)}
    name = next((name for name, rate in rates.items() if rate), None)
    if name is not None:
        raise UserError(
            f"{type(model).__name__} skips blocks at random while it trains ({name} is "
            f"{rates[name]:g}), and a skipped block has nothing to capture; set layerdrop to 0, "
            "in its configuration before it is made"
        )


def _try(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Collection[int],
    what: str,
    field: str = "",
    *,
    outputs: bool = False,
) -> Capture:
    # what is missing is named below, with why
    with capture(model, hidden=layers, outputs=outputs, whole=False) as states:
        try:
            model(**inputs, **capture_keywords(model))
        except UserError:
            raise
        except FOREIGN_ERRORS as error:
            smaller = f"; give a smaller {field}, or another model" if field else ""
            raise UserError(
                f"{type(model).__name__} can't read {what} "
                f"({type(error).__name__}: {one_line(error)}){smaller}"
            ) from error
    return states


def _check_repeats(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], layers: Collection[int]
) -> None:
    """See that a model draws no numbers; where attention is captured, that shows there."""
    few = {
        name: tensor[:1] if tensor.ndim > 2 else tensor[:1, :8] for name, tensor in inputs.items()
    }
    first, second = (_try(model, few, layers, "the same twice") for _ in range(2))
    if not all(_near(second.hidden[layer], first.hidden[layer], None) for layer in layers):
        raise UserError(
            f"{type(model).__name__} gives other states when it reads the same again, so nothing "
            "can be matched with them; give a model that draws no numbers"
        )


def _check_head(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    # a few tokens of one sequence: [tokens, vocabulary] is made here
    few = {name: tensor[:1, :8] for name, tensor in inputs.items()}
    try:
        check_head(model, {**few, **capture_keywords(model)})
    except UserError:
        raise
    except FOREIGN_ERRORS as error:
        raise UserError(
            f"{type(model).__name__}: its last layer can't be left out of a pass "
            f"({type(error).__name__}: {one_line(error)}), so fastkd can't "
            "compute its logits in parts; leave losses.logits and student.head out"
        ) from error


def _check_states(
    model: PreTrainedModel,
    states: Capture,
    inputs: Mapping[str, Tensor],
    layers: Collection[int],
) -> None:
    missing = [layer for layer in layers if not isinstance(states.hidden.get(layer), Tensor)]
    if missing:
        raise UserError(
            f"{type(model).__name__}: the blocks of layers {missing} are not called as modules, or "
            "give no tensor, so their states can't be captured; leave losses.hidden and "
            "losses.embedding out, or give a model whose blocks are"
        )
    ids, width = inputs.get("input_ids"), getattr(model.config, "hidden_size", None)
    mask = inputs.get("attention_mask")
    if not isinstance(width, int):
        raise UserError(
            f"{type(model).__name__} has no hidden_size; give a model whose blocks hand on one "
            "vector of that size a token"
        )
    for layer in layers:
        state = states.hidden[layer]
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


def _check_outputs(model: PreTrainedModel, states: Capture, inputs: Mapping[str, Tensor]) -> None:
    found, ids = states.outputs, inputs.get("input_ids")
    if found is None or found.ndim != 3 or (ids is not None and found.shape[:2] != ids.shape):
        given = "hands on no last_hidden_state"
        if found is not None:
            given = f"hands on a last_hidden_state {list(found.shape)}"
        raise UserError(
            f"{type(model).__name__} {given}, expected [batch, tokens, width], so no loss can read "
            "it; leave losses of embeddings out, or give a model that hands on a state a token"
        )


def _try_attention(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    plain: Capture,
    cheap: CheapProducts | None,
) -> AttentionTraits:
    name = type(model).__name__
    route_attention(model)
    mask = inputs.get("attention_mask")
    routed, found = _probe(model, inputs, plain.hidden, cheap)
    for layer, state in plain.hidden.items():
        if not _near(routed.hidden[layer], state, None if mask is None else mask.bool()):
            raise UserError(
                f"{name}: layer {layer} gives other states when its attention is captured, as a "
                "model does that chooses its masks by the attention's name, or draws numbers; "
                f"{TAKE_OUT}"
            )
    several = [layer for layer, calls in found.items() if len(calls) > 1]
    if several:
        raise UserError(
            f"{name}: layers {several} attend more than once in a forward pass, so their attention "
            f"can't be captured; {TAKE_OUT}"
        )
    missing = [layer for layer, calls in found.items() if not calls]
    if missing:
        raise UserError(
            f"{name}: the attention of layers {missing} does not go through transformers' "
            f"attention interface, so it can't be captured; {TAKE_OUT}, or give a model whose "
            "attention does"
        )
    traits = traits_of(name, {layer: calls[0] for layer, calls in found.items()})
    if traits.differs is None:
        with _moved_zeros(model) as moved:
            if moved:
                _, found = _probe(model, inputs, (), cheap)
                later = traits_of(name, {layer: calls[0] for layer, calls in found.items()})
                if later.differs is not None:
                    differs = f"{later.differs}, as soon as parameters that are 0 now have learned"
                    traits = replace(traits, differs=differs)
    return traits


def _probe(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Collection[int],
    cheap: CheapProducts | None,
) -> tuple[Capture, dict[int, list[Seen]]]:
    """Run a routed model: the hidden states of some layers, and what every call of an attention
    function showed, by block."""
    blocks, measure = find_blocks(model), Errors(inputs.get("attention_mask"), cheap)
    found: dict[int, list[Seen]] = {number: [] for number in range(1, len(blocks) + 1)}
    with ExitStack() as stack:
        for number, block in enumerate(blocks, start=1):
            stack.enter_context(listening(block, Prober(found[number], measure)))
        states = _try(model, inputs, layers, "its inputs with its attention captured")
    return states, found


@contextmanager
def _moved_zeros(model: PreTrainedModel) -> Iterator[bool]:
    """Let parameters that train and are 0 all over be as if they had learned, while the context is
    open: what they add to scores, or to masks, does nothing before. Whether there are any."""
    zeros = [p for p in model.parameters() if p.requires_grad and p.numel() and not p.any()]
    kept = [parameter.clone() for parameter in zeros]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in zeros:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.mul_(_NOISE))
        yield bool(zeros)
    finally:
        for parameter, before in zip(zeros, kept, strict=True):
            parameter.copy_(before)


def _deepest(model: PreTrainedModel) -> int | None:
    """The last layer of a model, where its blocks are found."""
    try:
        return len(find_blocks(model))
    except UserError:
        return None


def _takes_routes(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], deepest: int, state: Tensor | None
) -> bool:
    """Whether a model whose attention nobody listens to gives the same through the listener, where
    its masks are made without a read.

    Args:
        model: unrouted.
        inputs: of the trial.
        deepest: its last layer.
        state: what that gave.
    """
    mask = inputs.get("attention_mask")
    if state is None or state.ndim != 3 or not model._can_set_attn_implementation():
        return False
    with routed(model):
        try:
            heard = _try(model, inputs, {deepest}, "its inputs through the listener")
        except UserError:
            return False
    return _near(heard.hidden[deepest], state, None if mask is None else mask.bool())


def _near(given: Tensor, expected: Tensor, valid: Tensor | None) -> bool:
    """Whether two states [batch, tokens, width] agree where nothing is padding."""
    difference = (given.float() - expected.float()).abs()
    if valid is not None:
        difference = difference * valid.unsqueeze(-1)
    eps = torch.finfo(expected.dtype).eps
    return bool(difference.max() <= 64 * eps * expected.float().abs().max())
