"""Words near a word, whatever its context: from a list of synonyms or from GloVe vectors."""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastkd.data.text.files import changed_meanwhile, file_digest, text_lines
from fastkd.errors import UserError

GLOVE_WORDS = 100_000
"""First, that is most frequent, words of a GloVe file that are read, as the official code does."""
_WORDS_AT_ONCE = 256

Found = dict[str, tuple[str, ...]]


class Neighbours(ABC):
    """A file that neighbours come from."""

    path: Path

    def find(self, words: Collection[str], count: int) -> Found:
        """Up to `count` neighbours of each word that has some.

        Args:
            words: in lower case.
            count: of each.

        Raises:
            UserError: the file can't be read, with the line, or is no longer what `digest` tells.
        """
        before = self._content
        found = self._find(words, count)
        if file_digest(self.path, quick=False) != before:
            raise changed_meanwhile(str(self.path))
        return found

    @abstractmethod
    def _find(self, words: Collection[str], count: int) -> Found:
        """`find`, of the file as it is."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Key of the content as it was when it was first asked for."""

    @cached_property
    def _content(self) -> str:
        return file_digest(self.path, quick=False)


@dataclass(frozen=True)
class SynonymList(Neighbours):
    """A file of `word TAB paraphrase`, read both ways.

    Such lists hold numbers, names and spelling variants: only known words are taken. A word with
    more paraphrases than wanted keeps the first ones of the file.
    """

    path: Path
    known: frozenset[str] = field(repr=False)
    """Words that a paraphrase may be, in lower case."""

    def _find(self, words: Collection[str], count: int) -> Found:
        found: dict[str, dict[str, None]] = {}
        for first, second in self._pairs():
            for word, other in ((first, second), (second, first)):
                if word in words and other in self.known and len(found.get(word, ())) < count:
                    found.setdefault(word, {})[other] = None
        return {word: tuple(others) for word, others in found.items()}

    @property
    def digest(self) -> str:
        known = hashlib.sha256(" ".join(sorted(self.known)).encode()).hexdigest()
        return f"synonyms {self._content} {known}"

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(text_lines(self.path), start=1):
            pair = [_plain(part) for part in line.split("\t")]
            if len(pair) != 2:
                raise UserError(
                    f"{self.path}, line {number}: {len(pair)} columns, expected a word, TAB and "
                    "its paraphrase"
                )
            if pair[0] != pair[1]:
                yield pair[0], pair[1]


def _largest(row: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Places of the `count` largest numbers, the largest first, of equal ones the first."""
    least = np.partition(row, -count)[-count]
    found = np.flatnonzero(row >= least)
    return found[np.argsort(-row[found], kind="stable")[:count]]


@dataclass(frozen=True)
class GloveFile(Neighbours):
    """A file of `word number number ...`: nearest by cosine, words of letters alone."""

    path: Path

    def _find(self, words: Collection[str], count: int) -> Found:
        vocabulary, vectors = self._read()
        place = {word: number for number, word in enumerate(vocabulary)}
        known = sorted(word for word in words if word in place)
        found: Found = {}
        for start in range(0, len(known), _WORDS_AT_ONCE):
            part = known[start : start + _WORDS_AT_ONCE]
            rows = [place[word] for word in part]
            cosines = vectors[rows] @ vectors.T
            cosines[range(len(part)), rows] = -np.inf
            kept = min(count, len(vocabulary) - 1)
            for word, row in zip(part, cosines, strict=True):
                if kept:
                    found[word] = tuple(vocabulary[number] for number in _largest(row, kept))
        return found

    @property
    def digest(self) -> str:
        return f"glove {self._content}"

    def _read(self) -> tuple[list[str], npt.NDArray[np.float32]]:
        vocabulary: dict[str, None] = {}
        vectors: list[npt.NDArray[np.float32]] = []
        width = None
        for number, line in enumerate(islice(text_lines(self.path), GLOVE_WORDS), start=1):
            word, *numbers = line.rstrip(" ").split(" ")
            width = width or len(numbers)
            # some words of the largest file have blanks inside
            kept = numbers[-width:] if width else []
            try:
                # Python's spelling of 10 as 1_0 is no number of such a file
                vector = np.asarray([] if "_" in "".join(kept) else kept, dtype=np.float32)
            except ValueError:
                vector = np.empty(0, dtype=np.float32)
            if not len(vector) or len(vector) != width or not np.isfinite(vector).all():
                raise UserError(
                    f"{self.path}, line {number}: expected a word and {width or 'its'} finite "
                    "numbers, split by blanks"
                )
            length = float(np.linalg.norm(vector))
            spelled = _plain(word)
            # of a word in several cases the first one, the most frequent, stands for it
            known = spelled in vocabulary
            if spelled.isalpha() and len(numbers) == width and length and not known:
                vocabulary[spelled] = None
                vectors.append(vector / length)
        if not vocabulary:
            raise UserError(f"{self.path}: no words in it; expected word vectors as GloVe's")
        return list(vocabulary), np.stack(vectors)


def _plain(word: str) -> str:
    # some lists hold ligatures
    return unicodedata.normalize("NFKC", word.strip()).lower()
