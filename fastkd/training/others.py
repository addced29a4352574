"""Further teachers, of which the student learns the embedding, or the scores, that all give."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import try_model, vocabulary_size
from fastkd.data.known_ids import limit_ids
from fastkd.data.sequences import has_token_types, uses_token_types
from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.losses.ensemble import Ensemble
from fastkd.losses.factory import capture_needs, embedding_losses, score_losses
from fastkd.losses.pooling import EmbeddingModules
from fastkd.models import (
    UnknownModule,
    load_teacher,
    read_embedding,
    read_tokenizer,
    vocabulary_difference,
)
from fastkd.models.classifier import follow_labels
from fastkd.recipe import Recipe
from fastkd.recipe.models import OtherTeacher as Section
from fastkd.training.embeddings import compare_lengths
from fastkd.training.finite import check_weights
from fastkd.training.teacher import OtherTeacher

logger = logging.getLogger(__name__)


def load_others(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[OtherTeacher]:
    """The further teachers of a recipe, tried, on the CPU.

    Args:
        recipe: its `teacher.others`.
        teacher: the first teacher.
        tokenizer: of that.

    Raises:
        UserError: one that can't be read, reads text as other tokens or with others around it, or
            gives another number of scores; or losses that read nothing of them.
    """
    if not recipe.teacher.others:
        return []
    _check_read(recipe)
    return [_load(recipe, given, teacher, tokenizer) for given in recipe.teacher.others]


def ensemble_of(
    recipe: Recipe, modules: EmbeddingModules | None, others: list[OtherTeacher]
) -> Ensemble | None:
    """What the teachers of a recipe come to, `None` where there is one.

    Args:
        recipe: its `teacher.combine`.
        modules: what makes the first teacher's embeddings, where a loss reads those.
        others: from `load_others`.

    Raises:
        UserError: they have no mean.
    """
    if not others:
        return None
    if modules is None or not embedding_losses(recipe.losses, recipe.student.head):
        # scores alone are read
        return Ensemble((), "mean")
    dims = (modules.dim, *(other.modules.dim for other in others))
    return Ensemble(dims, recipe.teacher.combine)


def _check_read(recipe: Recipe) -> None:
    """See that losses read what several teachers come to."""
    head = recipe.student.head
    reads, scores = embedding_losses(recipe.losses, head), score_losses(recipe.losses, head)
    if not reads and not scores:
        raise UserError(
            "teacher.others is given, but no loss reads embeddings or scores, in which alone "
            "several teachers come together; give losses.embedding_output, or leave others out"
        )
    if scores and recipe.teacher.combine == "concatenate":
        raise UserError(
            f"teacher.combine is concatenate, but losses.{scores[0]} reads what heads give, of "
            "which there is a mean only; leave combine out"
        )
    stated = next((name for name, config in reads.items() if config.pooling is not None), None)
    if stated is not None:
        raise UserError(
            f"losses.{stated}.pooling is given, but each of several teachers pools as its own "
            "modules say; leave pooling out, or teacher.others"
        )


def _load(
    recipe: Recipe,
    section: Section,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> OtherTeacher:
    source, head = section.source, recipe.student.head
    given = f"teacher.others {source.name}"
    own = read_tokenizer(source)
    if own is None:
        logger.warning("%s: holds no tokenizer, so it is taken to share the teacher's", given)
    difference = None if own is None else vocabulary_difference(own, tokenizer)
    if difference is not None:
        raise UserError(
            f"{given}: its tokenizer is not the teacher's: {difference}; give teachers that share "
            "one, in teacher.model and teacher.others"
        )
    model = load_teacher(
        source,
        dtype=getattr(torch, recipe.teacher.states),
        attention=recipe.teacher.attention,
        head=head,
        field="teacher.others",
    )
    check_weights(model, given)
    limit_ids(tokenizer, vocabulary_size(model), given)
    if own is not None:
        _check_frame(recipe, own, tokenizer, model, given)
    compare_lengths(recipe, source, own or tokenizer, "teacher.others")
    if HEADS[head].labels == "example" and model.config.num_labels != teacher.config.num_labels:
        raise UserError(
            f"{given}: its head gives {model.config.num_labels} numbers, but the first teacher's "
            f"{teacher.config.num_labels}; give teachers whose scores have a mean"
        )
    if HEADS[head].labels == "example":
        follow_labels(model, teacher.config, given)
    assert recipe.data is not None, "a task has one teacher"
    # of further teachers embeddings and scores are read
    needs = {**capture_needs(recipe.losses), "attention": False, "hidden": False}
    try_model(model, recipe.data.block_size, "data.block_size", **needs)
    try:
        return OtherTeacher(model, read_embedding(source, model.config, head))
    except UnknownModule as error:
        raise UserError(f"teacher.others: {error}") from error


def _check_frame(
    recipe: Recipe,
    own: PreTrainedTokenizerBase,
    first: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    given: str,
) -> None:
    """See that a further teacher would be given what the first one's tokenizer makes of a text, or
    of a pair where pairs are read.

    Args:
        recipe: of the run.
        own: the tokenizer of the further teacher.
        first: of the first one, which reads for all.
        model: the further teacher.
        given: what the user calls it.

    Raises:
        UserError: its own tokenizer puts other tokens around texts, or tells those of a pair apart
            where the first one's doesn't, or the other way round.
    """
    form = recipe.row_form
    paired = form is not None and form.paired
    texts = ("a text", "another") if paired else ("a text",)
    made, read = (list(each(*texts)["input_ids"]) for each in (own, first))
    if made != read:
        found, expected = (" ".join(own.convert_ids_to_tokens(ids)) for ids in (made, read))
        raise UserError(
            f"{given}: its tokenizer makes {found!r:.200} of {' and '.join(map(repr, texts))}, but "
            f"all teachers read what the first one's makes, {expected!r:.200}; give teachers whose "
            "tokenizers put the same tokens around texts"
        )
    if paired and has_token_types(model.config):
        told, tells = (uses_token_types(model.config, each) for each in (own, first))
        if told != tells:
            raise UserError(
                f"{given}: token_type_ids are {_used(told)} of its tokenizer's pairs, but "
                f"{_used(tells)} of those of the first teacher's, which reads for all; give "
                "teachers whose tokenizers name the same model_input_names"
            )
    if form is not None and own.truncation_side != first.truncation_side:
        logger.warning(
            "%s: reads long texts as the first teacher does, cut on the %s, and not on the %s",
            *(given, first.truncation_side, own.truncation_side),
        )


def _used(are: bool) -> str:
    return "part" if are else "no part"
