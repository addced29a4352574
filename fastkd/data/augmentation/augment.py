"""More examples by replaced words, as TinyBERT makes them (arXiv 1909.10351, Algorithm 1).

Each word of a copy is replaced with probability p_t by one of its K candidates, drawn evenly. A
word that is a single token of a masked language model takes the words that the model finds most
probable in its place; any other word takes its nearest neighbours in a list. Words that carry no
meaning of their own stay, as in the official code. Copies keep the label of their example: what
they are for is the teacher's answer to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fastkd.data.augmentation.candidates import Replaceable, find_candidates
from fastkd.data.augmentation.masked_lm import MaskedWords, whole_words
from fastkd.data.augmentation.synonyms import (
    GloveFile,
    Neighbours,
    SynonymList,
)
from fastkd.data.tasks.read import Example, Examples
from fastkd.data.text.cache import cache_key
from fastkd.errors import UserError
from fastkd.files.home import at_home

_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How examples are multiplied; the defaults are the paper's.

    Raises:
        UserError: a value out of range, or sources that contradict each other.
    """

    copies: int = 20
    """N_a: copies of an example, at most, because a copy that equals another is left out."""
    probability: float = 0.4
    """p_t: that a word is replaced."""
    candidates: int = 15
    """K: words that one is replaced from."""
    source: Literal["masked_model", "neighbours"] = "masked_model"
    """Where words that are a single token take their candidates from; `neighbours` does without a
    masked language model and takes the list for every word."""
    masked_model: str | None = None
    """Folder or hub name of a masked language model."""
    show_original: bool = False
    """Let the model read the original text behind the masked one, as the official code does:
    candidates stay nearer to the word that they replace."""
    glove: str | None = None
    """File of word vectors, plain or gzipped: the first 100,000 words are neighbours by cosine."""
    synonyms: str | None = None
    """File of `word TAB paraphrase`, plain or gzipped, in place of word vectors. Without either,
    words of several tokens stay."""
    seed: int = 0
    """Seed of what is replaced by what."""
    batch_size: int = 64
    """Masked texts in one forward pass; decides speed and memory alone."""

    def __post_init__(self) -> None:
        checks = (
            ("copies", self.copies >= 1, "1 or more"),
            ("probability", 0 < self.probability <= 1, "above 0 and up to 1"),
            ("candidates", self.candidates >= 1, "1 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
        )
        for name, fits, expected in checks:
            if not fits:
                raise UserError(
                    f"augmentation.{name}: {getattr(self, name)} given, expected {expected}"
                )
        if self.glove and self.synonyms:
            raise UserError("augmentation: glove and synonyms are both given; give one of them")
        if self.source == "masked_model" and self.masked_model is None:
            raise UserError(
                "augmentation.masked_model: missing; name a masked language model, or set "
                "augmentation.source to neighbours to take every word's candidates from a list"
            )
        if self.source == "neighbours" and self.masked_model is not None:
            raise UserError(
                "augmentation.masked_model is given, but augmentation.source is neighbours, which "
                "does without; leave one of them out"
            )
        if self.source == "neighbours" and not (self.glove or self.synonyms):
            raise UserError(
                "augmentation.source is neighbours, but no list is named; give "
                "augmentation.synonyms or augmentation.glove"
            )


@dataclass(frozen=True)
class Augmented:
    """An `ExampleSource`: each example followed by its copies, which are drawn when it is read."""

    examples: Examples
    settings: Augmentation
    cache: Path
    """Folder of all cached data; the candidates are stored there."""
    masked: MaskedWords | None = field(repr=False)
    neighbours: Neighbours | None
    progress: bool = True

    @property
    def regression(self) -> bool:
        """Whether labels are scores."""
        return self.examples.regression

    @property
    def digest(self) -> str:
        """Key of the examples, the candidates and the draws."""
        names = ("copies", "probability", "seed")
        draws = {name: getattr(self.settings, name) for name in names}
        return cache_key({"candidates": self._candidates_key(), **draws})

    def __iter__(self) -> Iterator[Example]:
        numbers: dict[str, int] = {}
        for texts in self.examples.texts:
            for text in texts:
                numbers.setdefault(text, len(numbers))
        table = find_candidates(
            self.cache / self._candidates_key(),
            list(numbers),
            masked=self.masked,
            neighbours=self.neighbours,
            count=self.settings.candidates,
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )
        for row, example in enumerate(self.examples):
            yield example
            words = [table.of(numbers[text]) for text in example.texts]
            for texts in self._copies(example.texts, words, row):
                yield Example(texts, example.label)

    def _candidates_key(self) -> str:
        return cache_key(
            {
                "augmentation": _FORMAT,
                "examples": self.examples.digest,
                "masked": self.masked.digest if self.masked else None,
                "neighbours": self.neighbours.digest if self.neighbours else None,
                "candidates": self.settings.candidates,
            }
        )

    def _copies(
        self, texts: tuple[str, ...], words: list[list[Replaceable]], row: int
    ) -> list[tuple[str, ...]]:
        """Copies of one example that differ from it and from each other."""
        # a generator for each example: no draw depends on the examples around it
        generator = np.random.default_rng([self.settings.seed, row])
        seen = {texts: None}
        for _ in range(self.settings.copies):
            draws = iter(generator.random((sum(map(len, words)), 2)).tolist())
            copy = tuple(
                _replace(text, replaceable, draws, self.settings.probability)
                for text, replaceable in zip(texts, words, strict=True)
            )
            seen[copy] = None
        return list(seen)[1:]


def augment(
    examples: Examples,
    settings: Augmentation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache: str | Path,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Augmented:
    """Multiply examples: give the result to `encode_examples` in their place.

    Nothing is asked of the masked language model before the result is read, and then once: the
    candidates are stored for every seed, probability and number of copies.

    Args:
        examples: the split that is trained on.
        settings: how.
        tokenizer: of the models; of a list of synonyms it takes the words that are one token to it.
        cache: folder of all cached data.
        device: where the masked language model runs.
        progress: whether to show a bar.

    Raises:
        UserError: the masked language model or the list can't be read.
    """
    masked = None
    if settings.masked_model is not None:
        masked = MaskedWords.load(
            settings.masked_model, device=device, show_original=settings.show_original
        )
    neighbours: Neighbours | None = None
    if settings.synonyms is not None:
        known = frozenset(word.lower() for word in whole_words(tokenizer).values())
        neighbours = SynonymList(Path(settings.synonyms).expanduser(), known)
    if settings.glove is not None:
        neighbours = GloveFile(Path(settings.glove).expanduser())
    folder = at_home(cache, "task.cache")
    return Augmented(examples, settings, folder, masked, neighbours, progress)


def _replace(
    text: str, words: list[Replaceable], draws: Iterator[list[float]], probability: float
) -> str:
    parts, end = [], 0
    for word in words:
        chance, choice = next(draws)
        if chance <= probability:
            new = word.choices[int(choice * len(word.choices))]
            parts += [text[end : word.start], _in_case_of(text[word.start : word.end], new)]
            end = word.end
    return "".join([*parts, text[end:]])


def _in_case_of(old: str, new: str) -> str:
    """The new word with capitals where the old one has them: lists are in lower case."""
    if old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new
