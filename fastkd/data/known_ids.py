"""Which ids of a tokenizer its models embed: one may have tokens behind the last row of a table.

Text models of Gemma 3 come so: the whole family has one tokenizer, whose `<image_soft_token>` has
the id behind their last row. No text need hold such a token; one that does is refused where ids are
made, whoever asks for them. The number of rows is noted on the tokenizer, which is what all that
make ids have in hand, and copies and other processes get it along.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fastkd.errors import UserError

_ROWS = "_fastkd_rows"


def limit_ids(
    tokenizer: PreTrainedTokenizerBase, rows: int, given: str, whose: str = "its tokenizer"
) -> None:
    """Let a tokenizer make only ids that a model embeds, besides those of earlier calls.

    Args:
        tokenizer: changed in what `check_ids` then refuses.
        rows: of the model's table of embeddings.
        given: what the user calls the model.
        whose: what they call the tokenizer.

    Raises:
        UserError: an id outside the table belongs to a word, or to a token that stands around,
            between or in the place of texts; added tokens alone may stand there.
    """
    ids = tokenizer.get_vocab()
    if max(ids.values()) < rows:
        return
    named = {
        token
        for name, token in tokenizer.special_tokens_map.items()
        if name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
    }
    added = tokenizer.added_tokens_decoder
    needed = [
        (number, token)
        for token, number in ids.items()
        if number >= rows and (number not in added or token in named)
    ]
    if needed:
        number, token = max(needed)
        raise UserError(
            f"{given}: the model embeds {rows} tokens, but {whose} gives {token!r:.100} the id "
            f"{number}; give the folder the tokenizer that the model was trained with"
        )
    setattr(tokenizer, _ROWS, min(rows, known_rows(tokenizer) or rows))


def known_rows(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Below which number ids must stay; `None` where all that the tokenizer makes are embedded."""
    found: int | None = getattr(tokenizer, _ROWS, None)
    return found


def drawn_below(tokenizer: PreTrainedTokenizerBase) -> int:
    """Below which number random ids are drawn, so that models embed them."""
    return min(len(tokenizer), known_rows(tokenizer) or len(tokenizer))


def check_ids(ids: npt.NDArray[Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """See that models embed what a tokenizer made.

    Raises:
        UserError: naming the first token that one doesn't.
    """
    rows = known_rows(tokenizer)
    if rows is None or not ids.size or ids.max() < rows:
        return
    number = int(ids[np.argmax(ids >= rows)])
    token = tokenizer.convert_ids_to_tokens(number)
    raise UserError(
        f"a text holds the token {token!r:.100}, whose id {number} is behind the {rows} tokens "
        "that the model embeds; take it out of the text, or give a model that embeds it"
    )
