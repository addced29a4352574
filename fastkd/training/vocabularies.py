"""By which tokenizer each model reads: one for both or, of a student with another vocabulary, two.

Two models that read the same text as other tokens can be compared in what they make of all of it,
embeddings and scores, and in nothing that they make of a token.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import leave_types_out, vocabulary_size
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
    teacher: PreTrainedTokenizerBase | None = None
    """The teacher's, where it makes other ids."""


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
        return Tokenizers(theirs)
    given = f"student.init {recipe.student.init}"
    own = read_tokenizer(start)
    if own is None:
        logger.warning("%s: holds no tokenizer, so it is taken to share the teacher's", given)
        if len(theirs) > vocabulary_size(student):
            raise UserError(
                f"{given}: embeds {vocabulary_size(student)} tokens, but the teacher's tokenizer "
                f"has {len(theirs)}; give the folder the tokenizer that it was trained with"
            )
        return Tokenizers(theirs)
    difference = vocabulary_difference(own, theirs)
    if difference is None:
        return Tokenizers(theirs)
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
    return Tokenizers(load_tokenizer(start, vocabulary_size(student)), theirs)


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
