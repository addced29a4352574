"""Which token pads, so that padding changes no answer.

A decoder's classification head reads the last token that is not `config.pad_token_id`, whatever
the mask says. So the model decides what pads: with its own id the token that is read is the one
that it reads without padding, also where examples hold that id or end with it. A model without one
reads the last token; so it does with padding that no example holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastkd.data.sequences import Sequences
from fastkd.errors import UserError

_CHUNK = 1 << 22


def reads_padding(model: PreTrainedModel) -> bool:
    """Whether a model's head finds the token that it reads by the id that pads."""
    return "pad_token_id" in inspect.getsource(type(model).forward)


def own_padding(config: PreTrainedConfig) -> int | None:
    """The id that a model's configuration says pads, if it is one that the model embeds."""
    pad = _named(config)
    return pad if pad is not None and 0 <= pad < config.vocab_size else None


def padding_id(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, sets: Iterable[Sequences]
) -> int:
    """The id that examples are padded with: the model's, else one that none of them holds.

    Args:
        config: of the model whose answers are right without padding.
        tokenizer: whose padding or end is taken first, where no example holds it.
        sets: all examples that are read.

    Raises:
        UserError: the model has none, and examples hold every id that it embeds.
    """
    own = own_padding(config)
    if own is not None:
        return own
    held = _held_ids(sets, config.vocab_size)
    for special in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if special is not None and not held[special]:
            return int(special)
    if held.all():
        raise UserError(
            f"the model's config.json names no pad_token_id, and examples hold each of its "
            f"{config.vocab_size} tokens; name the one that pads"
        )
    return int(held.argmin())


def hand_on_padding(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    pad: int,
    sets: Iterable[Sequences],
) -> int | None:
    """Let a tokenizer pad as its decoder does, or not at all.

    A token that becomes special is cut out of texts first. That changes nothing where it is special
    already, or where no example holds it and no other token contains it. Where the tokenizer can't
    pad with the model's id it pads with none: batches are then refused, not answered wrongly.

    Args:
        config: as the model came.
        tokenizer: is handed on with the model; pads on the right from now on, as the examples were.
        pad: what the examples were padded with.
        sets: all examples that were read.

    Returns:
        The `pad_token_id` to hand the model on with.
    """
    own = own_padding(config)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id != pad and _may_pad(tokenizer, pad, own, sets):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    if tokenizer.pad_token_id == pad:
        return pad
    if own is not None:
        tokenizer.pad_token = None
    return _named(config)


def _held_ids(sets: Iterable[Sequences], vocabulary: int) -> npt.NDArray[np.bool_]:
    """Whether any example holds an id, [vocabulary]."""
    held = np.zeros(vocabulary, dtype=bool)
    for examples in sets:
        for start in range(0, len(examples.tokens), _CHUNK):
            held[examples.tokens[start : start + _CHUNK]] = True
    return held


def _may_pad(
    tokenizer: PreTrainedTokenizerBase,
    pad: int,
    own: int | None,
    sets: Iterable[Sequences],
) -> bool:
    """Whether a tokenizer reads every text as before when a token of its becomes its padding."""
    token = tokenizer.convert_ids_to_tokens(pad)
    if token is None:
        return False
    if pad in tokenizer.all_special_ids or pad in tokenizer.added_tokens_decoder:
        # the next text may hold what these examples didn't
        return own is not None or pad != tokenizer.unk_token_id
    if own is None or sum(token in other for other in tokenizer.get_vocab()) > 1:
        return False
    return not any((examples.tokens == pad).any() for examples in sets)


def _named(config: PreTrainedConfig) -> int | None:
    pad: int | None = getattr(config, "pad_token_id", None)
    return pad
