"""Pairs of texts that people have scored, as models read them: to judge embeddings by."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fastkd.data.rows.read import TextRow, read_rows
from fastkd.data.rows.tokenized import EncodedRows, RowEncoder
from fastkd.data.sequences import sequences_of, uses_token_types
from fastkd.data.text import TextSettings
from fastkd.data.text.files import Records
from fastkd.data.text.sources import resolve
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.recipe.evaluate import SentencePairs
from fastkd.row_form import RowForm

logger = logging.getLogger(__name__)


def read_pairs(path: str, split: str, form: RowForm, cache: str, field: str) -> list[TextRow]:
    """Read pairs of texts with their scores.

    Args:
        path: one place, as a recipe names text.
        split: of a data set.
        form: two columns, and one of scores.
        cache: folder for what the hub sends.
        field: of the recipe, for messages.

    Raises:
        UserError: what can't be read, with its place; too few pairs, or one score for all of them.
    """
    settings = TextSettings(
        train=(path,), split=split, text_column=form.columns[0], documents="row", cache=cache
    )
    try:
        sources = resolve(settings.train, settings, split_field=f"{field}.split")
        for source in sources:
            if not isinstance(source, Records):
                raise UserError(
                    f"{source.called()} is text without columns; give .tsv, .csv or .jsonl"
                )
        rows = list(read_rows(sources, form, f"{field}.sentence1, .sentence2 and .score"))
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    if len({row.scores for row in rows}) < 2:
        raise UserError(
            f"{field}: {path} holds {len(rows)} pairs and no two scores that differ, with which "
            "nothing correlates; give other pairs"
        )
    return rows


def encode_pairs(
    rows: Sequence[TextRow],
    form: RowForm,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    max_length: int,
    name: str,
) -> EncodedRows:
    """Tokenise pairs, each text by itself, in memory.

    Args:
        rows: from `read_pairs`.
        form: of them, with what stands before each text.
        tokenizer: of the models.
        config: of the model: whether it is told the texts of a pair apart.
        max_length: tokens of a text, special tokens included; longer ones are cut, with a warning.
        name: of the pairs, for people.
    """
    made = RowEncoder(tokenizer, form, max_length)(rows)
    if made.cut:
        logger.warning(
            "%s: %d of %d texts are longer than %d tokens and were cut",
            *(name, made.cut, len(made.lengths), max_length),
        )
    scores: npt.NDArray[np.float32] = np.asarray([row.scores for row in rows], np.float32)
    types = uses_token_types(config, tokenizer)
    sequences = sequences_of(made, tokenizer, token_types=types, max_length=max_length)
    content = hashlib.sha256(scores.tobytes())
    for part in (sequences.offsets, sequences.tokens.astype(np.int64)):
        content.update(part.tobytes())
    return EncodedRows(sequences, each=2, scores=scores, fingerprint=content.hexdigest())


def prepare_pairs(
    given: Mapping[str, SentencePairs],
    ranks: Ranks,
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    teacher_config: PreTrainedConfig,
    cache: str,
    max_length: int,
    prompt: str,
) -> dict[str, EncodedRows]:
    """Pairs of texts that embeddings are scored on, by name; the first rank reads their files.

    Args:
        given: sections of a recipe, by name.
        ranks: this process among all.
        tokenizer: of the student, and of the teacher where that has none of its own.
        config: of the model that its inputs are made for.
        teacher_tokenizer: of the teacher, where it has one of its own.
        teacher_config: of the model that the inputs of that are made for.
        cache: folder for what the hub sends.
        max_length: tokens of a text, see `encode_pairs`.
        prompt: before texts of pairs that are given none.
    """
    found = {}
    for name, pairs in given.items():
        columns, field = (pairs.sentence1, pairs.sentence2), f"evaluate.pairs.{name}"
        prompts = dict.fromkeys(columns, prompt if pairs.prompt is None else pairs.prompt)
        form = RowForm(columns=columns, named=True, scores=(pairs.score,), prompts=prompts)
        rows = ranks.from_main(partial(read_pairs, pairs.path, pairs.split, form, cache, field))
        read = partial(encode_pairs, rows, form, max_length=max_length, name=name)
        found[name] = read(tokenizer, config)
        if teacher_tokenizer is not None:
            theirs = read(teacher_tokenizer, teacher_config)
            both = f"{found[name].fingerprint} {theirs.fingerprint}"
            found[name] = replace(found[name], teacher=theirs.sequences, fingerprint=both)
    return found
