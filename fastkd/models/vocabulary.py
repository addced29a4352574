"""Whether two models read text as the same ids: one batch of ids is given to both.

Embeddings of the same size may stand for other tokens. What is compared is text to ids and nothing
else: every token's id, then the ids of a text that asks for normalisation, splits and merges.
Padding, truncation, framing and the names of classes don't count.
"""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, normalizers
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fastkd.errors import UserError
from fastkd.models.checking import LOADING_ERRORS, not_loadable, optional_file
from fastkd.models.locate import locate_model
from fastkd.models.sentence_folder import reading_settings
from fastkd.types import ModelSource

logger = logging.getLogger(__name__)

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_PROBE = (
    "The quick brown fox jumps over the lazy dog",
    "THE Quick bRown FOX's don't, won't & can't!?",
    "na\u00efve caf\u00e9 Z\u00fcrich \u0130stanbul stra\u00dfe cafe\u0301",
    "  two  spaces,\ttabs\nand\r\nlines  ",
    "0 12 345 6789 3.14159 1,000,000 2024-01-31 \u00bd \u00b2",
    "\u6771\u4eac \u043c\u043e\u0441\u043a\u0432\u0430 \u0639\u0631\u0628\u064a \ud55c\uad6d\uc5b4",
    "\U0001f600 \ufb01ne \u2026 \u201cquoted\u201d \u2014 a\u200bb",
    "https://example.org/a_b?c=d#e f(x) = [y, {z}]; // <tag> $5 100% @user",
    "antidisestablishmentarianism unbelievably internationalisation",
)
# of the vocabulary, spread over it
_SAMPLE = 2000


def read_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or hub model, `None` where it holds none; it makes text lower-case
    where the model's sentence-transformers settings say so.

    Raises:
        UserError: there is one that can't be read.
    """
    name = locate_model(source.name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=source.revision, trust_remote_code=False
        )
        # without end, where the token of unknown words is unknown
        special = set(tokenizer.all_special_ids)
    except Exception as error:
        # of a file that it can't read, tokenizers raises just that
        if type(error) is not Exception and not isinstance(error, LOADING_ERRORS):
            raise
        known = optional_file(name, "config.json", source.revision) is not None
        if known and not any(optional_file(name, file, source.revision) for file in _FILES):
            return None
        raise UserError(not_loadable(f"tokenizer of {source.name}", error)) from error
    # transformers makes one of special tokens alone where a folder has no tokenizer
    if len(tokenizer) <= len(special):
        return None
    if reading_settings(source).get("do_lower_case") is True:
        return _lower_case(tokenizer, source.name)
    return tokenizer


def _lower_case(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """What reads text as sentence-transformers does, which makes it lower-case first.

    Raises:
        UserError: the tokenizer runs in Python, where nothing can be put in front.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{name}: its sentence-transformers settings say do_lower_case, but its tokenizer "
            f"({type(tokenizer).__name__}) has no tokenizer.json that could say so; give one that "
            "has, or texts in lower case and a folder without do_lower_case"
        )
    there = backend.normalizer
    each = [] if there is None else [there]
    if isinstance(there, normalizers.Sequence):
        each = [there[number] for number in range(len(there))]
    if any(isinstance(one, normalizers.Lowercase) for one in each):
        return tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *each])
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    # BertTokenizer and others make a normalizer of their own wherever they are loaded; the plain
    # class takes that of tokenizer.json
    inputs = list(tokenizer.model_input_names)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            folder, model_input_names=inputs
        )
    return plain


def check_saved(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, given: str) -> None:
    """See that a tokenizer reads text as the same ids where a model is loaded with it.

    Args:
        tokenizer: that a model is trained with.
        config: of that model, by which transformers chooses the tokenizer's class.
        given: what the user calls it.

    Raises:
        UserError: naming the first token or text that differs.
    """
    with TemporaryDirectory() as folder:
        config.to_json_file(Path(folder, "config.json"))
        tokenizer.save_pretrained(folder)
        again = read_tokenizer(ModelSource(folder))
    assert again is not None, "it has just been written"
    difference = vocabulary_difference(again, tokenizer, "as it was read")
    if difference is not None:
        raise UserError(
            f"{given}: whoever loads the student would read text otherwise than it was trained: "
            f"{difference} once its tokenizer ({type(tokenizer).__name__}) is saved and loaded; "
            "give the folder a tokenizer.json whose class stays as it is saved"
        )


def check_same_vocabulary(
    source: ModelSource, given: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """See that a model was trained on the ids that the teacher's tokenizer makes.

    One without a tokenizer is taken to share the teacher's, and it is said.

    Args:
        source: the model.
        given: what the user calls it.
        tokenizer: the teacher's.

    Raises:
        UserError: naming the first token or text that differs.
    """
    own = read_tokenizer(source)
    if own is None:
        logger.warning("%s: holds no tokenizer, so it is taken to share the teacher's", given)
        return
    difference = vocabulary_difference(own, tokenizer)
    if difference is not None:
        raise UserError(
            f"{given}: its tokenizer is not the teacher's: {difference}; give a model that was "
            "trained with the teacher's tokenizer"
        )


def vocabulary_difference(
    own: PreTrainedTokenizerBase,
    teachers: PreTrainedTokenizerBase,
    where: str = "in the teacher's",
) -> str | None:
    """The first token or text that two tokenizers read as other ids, `None` if there is none.

    Args:
        own: of the student.
        teachers: the other.
        where: what people call that.
    """
    mine, theirs = ({i: t for t, i in t.get_vocab().items()} for t in (own, teachers))
    for number in sorted(mine.keys() | theirs.keys()):
        if mine.get(number) != theirs.get(number):
            there, here = (_shown(table.get(number)) for table in (mine, theirs))
            return f"id {number} is {there} there and {here} {where}"
    step = max(1, len(mine) // _SAMPLE)
    words = [own.convert_tokens_to_string([mine[number]]) for number in sorted(mine)[::step]]
    texts = [*_PROBE, *words]
    for text, ids, expected in zip(texts, _ids(own, texts), _ids(teachers, texts), strict=True):
        if ids != expected:
            return f"{text!r} is {_some(ids)} there and {_some(expected)} {where}"
    return None


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _some(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 8 else f"[{', '.join(map(str, ids[:8]))}, ...]"
