"""By which tokenizer each model reads: one for both or, of a student with another vocabulary, two.

Two models that read the same text as other tokens can be compared in what they make of all of it,
embeddings and scores, and in nothing that they make of a token.

A student that begins as another model is handed on with that model's tokenizer: with its limit of
tokens, its special tokens and its chat template. What the teacher adds to it is said.
"""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import leave_types_out, vocabulary_size
from fastkd.data.known_ids import limit_ids
from fastkd.data.sequences import has_token_types
from fastkd.errors import UserError
from fastkd.losses.factory import token_losses
from fastkd.models import load_tokenizer, read_tokenizer, vocabulary_difference
from fastkd.recipe import Recipe
from fastkd.types import ModelSource

logger = logging.getLogger(__name__)


class Tokenizers(NamedTuple):
    """What reads text for a student and its teacher."""

    student: PreTrainedTokenizerBase
    """Also the teacher's, where that has none of its own."""
    teacher: PreTrainedTokenizerBase | None
    """The teacher's, where it makes other ids."""
    exported: PreTrainedTokenizerBase
    """What the student is handed on with; it makes the ids that the student's does."""
    notes: tuple[str, ...] = ()
    """What of it is another model's, one line each."""


def choose_tokenizers(
    recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel, start: ModelSource | None
) -> Tokenizers:
    """One tokenizer where it suits both models, else two.

    A model to start from that has no tokenizer is taken to share the teacher's, and it is said.

    Args:
        recipe: of the run.
        student: of whatever architecture.
        teacher: whose tokenizer is read.
        start: where the student's own may lie; `None` of one that was made of the teacher.

    Raises:
        UserError: a tokenizer that can't be read or makes ids that its model doesn't have; two of
            them, where data or losses take one.
    """
    theirs = load_tokenizer(recipe.teacher.source, vocabulary_size(teacher))
    if start is None:
        return Tokenizers(theirs, None, theirs)
    given = f"student.init {recipe.student.init}"
    own = read_tokenizer(start)
    if own is None:
        logger.warning("%s: holds no tokenizer, so it is taken to share the teacher's", given)
        limit_ids(theirs, vocabulary_size(student), given, "the teacher's tokenizer")
        return Tokenizers(theirs, None, theirs)
    difference = vocabulary_difference(own, theirs)
    if difference is None:
        limit_ids(theirs, vocabulary_size(student), given)
        return Tokenizers(theirs, None, *_exported(own, theirs, given))
    differs = f"{given}: its tokenizer is not the teacher's: {difference}"
    if recipe.row_form is None:
        raise UserError(
            f"{differs}; set data.documents to row, where each model reads by its own tokenizer, "
            "or give a model that was trained with the teacher's"
        )
    compared = token_losses(recipe.losses, recipe.student.head)
    if compared:
        raise UserError(
            f"{differs}; losses.{compared[0]} compares token by token, so leave it out and match "
            "embeddings or scores, or give a model that was trained with the teacher's tokenizer"
        )
    own = load_tokenizer(start, vocabulary_size(student))
    return Tokenizers(own, theirs, own)


def _exported(
    own: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, given: str
) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """What a student is handed on with that begins as another model with the teacher's ids: its own
    tokenizer, or the teacher's where its own puts other tokens around a text; and what of it is
    another model's."""
    notes = []
    made, template = own, own.chat_template
    if not all(_alike(_framed(own, *texts), _framed(theirs, *texts)) for texts in _FRAMED):
        notes.append(
            f"{given}: its tokenizer puts other tokens around a text than the teacher's, which "
            "the student is trained and handed on with"
        )
        made = copy.deepcopy(theirs)
        made.model_max_length = own.model_max_length
    if template is None and theirs.chat_template is not None:
        notes.append(f"{given}: has no chat template, so the student is given the teacher's")
        template = theirs.chat_template
    made.chat_template = template
    return made, tuple(notes)


def _framed(tokenizer: PreTrainedTokenizerBase, *texts: str) -> dict[str, object]:
    """What a model is given of a text or a pair, and what pads and hides in it."""
    made = dict(tokenizer(*texts, return_attention_mask=False))
    return {**made, "pad": tokenizer.pad_token_id, "mask": tokenizer.mask_token_id}


def _alike(one: dict[str, object], other: dict[str, object]) -> bool:
    # token types are given by the folders that name them, which changes no token
    return all(one[key] == other[key] for key in one.keys() & other.keys())


_FRAMED = (("a text",), ("a text", "another"))


def share_stops(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizers: Tokenizers, given: str
) -> list[str]:
    """Let a student that generates and begins as another model stop where its teacher does, too.

    Args:
        student: whose generation settings are changed.
        teacher: that it learns to end a text from.
        tokenizers: of both; two vocabularies share no token.
        given: what the user calls the model that the student begins as.

    Returns:
        What was added, in words.
    """
    generate = student.can_generate() and teacher.can_generate()
    if tokenizers.teacher is not None or not generate:
        return []
    own, theirs = _stops(student), _stops(teacher)
    added = [number for number in theirs if number not in own]
    if not added:
        return []
    student.generation_config.eos_token_id = [*own, *added]
    words = ", ".join(map(str, tokenizers.exported.convert_ids_to_tokens(added)))
    return [f"{given}: its generation ends at the teacher's {words} as well"]


def _stops(model: PreTrainedModel) -> list[int]:
    """The tokens that end what a model generates."""
    found = model.generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def share_token_types(*models: PreTrainedModel) -> PreTrainedModel:
    """Let models read the same inputs, of which some tell the texts of a pair apart by token types
    and others not.

    Returns:
        The one for which inputs are made.
    """
    typed = [model for model in models if has_token_types(model.config)]
    if typed:
        for model in models:
            if model not in typed:
                leave_types_out(model)
    return (typed or models)[0]
