"""Which words of which texts may be replaced, and by what: computed once, stored, drawn from often.

Candidates come from the original text with one word masked, as in TinyBERT's official code.
Algorithm 1 of the paper, taken literally, asks the model again for every copy, after the words
before; that costs `copies` times as much, and no stored candidate could serve another seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastkd.data.augmentation.masked_lm import (
    Masked,
    MaskedWords,
    Place,
)
from fastkd.data.augmentation.synonyms import Neighbours
from fastkd.data.text.cache import (
    is_complete,
    new_folder,
    read_meta,
    write_meta,
)
from fastkd.errors import UserError
from fastkd.files.flat import (
    append,
    flat_file,
    open_flat,
)
from fastkd.reporting.progress import progress_bar

_WORD = re.compile(r"[^\W\d_]+")
_APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}"
_BEFORE_NOT = re.compile(rf" ?[{_APOSTROPHES}]t\b", re.IGNORECASE)
_NONE = -1
_SPELLINGS = "words.json"
_FIELD = "task.cache"


class Replaceable(NamedTuple):
    """A word of a text and what may stand in its place."""

    start: int
    end: int
    choices: tuple[str, ...]


@dataclass(frozen=True)
class CandidateTable:
    """Replaceable words of texts."""

    offsets: npt.NDArray[np.int64]
    """[texts + 1] where each text starts in `spans`."""
    spans: npt.NDArray[np.int32]
    """[words, 2] first character of a word, and the one behind it."""
    choices: npt.NDArray[np.int32]
    """[words, candidates] numbers in `spellings`, filled up with -1."""
    spellings: list[str]

    def of(self, text: int) -> list[Replaceable]:
        """Replaceable words of the text of this number, in their order."""
        inside = slice(int(self.offsets[text]), int(self.offsets[text + 1]))
        return [
            Replaceable(start, end, tuple(self.spellings[n] for n in numbers if n != _NONE))
            for (start, end), numbers in zip(
                self.spans[inside].tolist(), self.choices[inside].tolist(), strict=True
            )
        ]


def is_replaceable(text: str, start: int, end: int) -> bool:
    """Whether a word carries meaning of its own: no stop word, no part of a contraction."""
    word = text[start:end]
    if len(word) < 2 or not word.isalpha() or word.lower() in _stop_words():
        return False
    after_apostrophe = start > 0 and text[start - 1] in _APOSTROPHES
    return not after_apostrophe and _BEFORE_NOT.match(text, end) is None


@cache
def _stop_words() -> frozenset[str]:
    # scikit-learn is of the extra `tasks`
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def find_candidates(
    folder: Path,
    texts: Sequence[str],
    *,
    masked: MaskedWords | None,
    neighbours: Neighbours | None,
    count: int,
    batch_size: int,
    progress: bool,
) -> CandidateTable:
    """Candidates for every replaceable word of the texts, from the cache where they are there.

    Args:
        folder: in the cache, of these texts and sources.
        texts: each once.
        masked: gives the candidates of words that are one token to it.
        neighbours: gives those of all other words.
        count: candidates of a word, at most.
        batch_size: masked texts in one forward pass.
        progress: whether to show a bar.
    """
    if not is_complete(folder, _FIELD):
        finder = _Finder(texts, masked, neighbours, count)
        with ExitStack() as stack:
            temporary = stack.enter_context(new_folder(folder, _FIELD))
            bar = stack.enter_context(progress_bar(progress and bool(finder.jobs)))
            task = bar.add_task("masked words", total=len(finder.jobs))
            for done in finder.ask(batch_size):
                bar.update(task, completed=done)
            finder.write(temporary)
    meta = read_meta(folder, _FIELD)
    words, width = meta["words"], meta["candidates"]
    return CandidateTable(
        offsets=open_flat(folder, "offsets", np.int64, meta["texts"] + 1, _FIELD),
        spans=open_flat(folder, "spans", np.int32, words * 2, _FIELD).reshape(words, 2),
        choices=open_flat(folder, "choices", np.int32, words * width, _FIELD).reshape(words, width),
        spellings=_read_spellings(folder),
    )


class _Finder:
    """Candidates of all texts, in memory until they are written."""

    def __init__(
        self,
        texts: Sequence[str],
        masked: MaskedWords | None,
        neighbours: Neighbours | None,
        count: int,
    ) -> None:
        self._texts = texts
        self._masked = masked
        self._count = count
        self._read = [masked.read(text) if masked else None for text in texts]
        self._places = [
            [p for p in _places(text, read) if is_replaceable(text, p.start, p.end)]
            for text, read in zip(texts, self._read, strict=True)
        ]
        self._found: dict[tuple[int, int], tuple[str, ...]] = {}
        unknown = {
            (number, index): texts[number][place.start : place.end].lower()
            for number, places in enumerate(self._places)
            for index, place in enumerate(places)
            if place.token is None
        }
        near = neighbours.find(set(unknown.values()), count) if neighbours and unknown else {}
        self._found = {key: near[word] for key, word in unknown.items() if word in near}
        self.jobs = [
            (number, index)
            for number, places in enumerate(self._places)
            for index, place in enumerate(places)
            if place.token is not None
        ]
        # similar lengths in one batch, the largest first: what does not fit fails at once
        self.jobs.sort(key=lambda job: -len(self._reading(job[0]).ids))

    def ask(self, batch_size: int) -> Iterator[int]:
        """Run the masked language model; yields how many words are done."""
        for start in range(0, len(self.jobs), batch_size):
            assert self._masked is not None
            part = self.jobs[start : start + batch_size]
            asked = [(self._reading(n), self._places[n][i].token or 0) for n, i in part]
            found = self._masked.most_probable(asked, self._count).tolist()
            spelled = self._masked.vocabulary
            for job, numbers in zip(part, found, strict=True):
                self._found[job] = tuple(spelled[number] for number in numbers)
            yield start + len(part)

    def write(self, folder: Path) -> None:
        """Store the words that have candidates."""
        numbers: dict[str, int] = {}
        kept = sorted(self._found)
        width = max((len(choices) for choices in self._found.values()), default=0)
        spans = ((self._places[n][i].start, self._places[n][i].end) for n, i in kept)
        rows = (
            [numbers.setdefault(word, len(numbers)) for word in self._found[key]]
            + [_NONE] * (width - len(self._found[key]))
            for key in kept
        )
        offsets = np.searchsorted([n for n, _ in kept], np.arange(len(self._texts) + 1))
        arrays: dict[str, tuple[Any, type]] = {
            "offsets": (offsets, np.int64),
            "spans": (chain.from_iterable(spans), np.int32),
            "choices": (chain.from_iterable(rows), np.int32),
        }
        for name, (values, dtype) in arrays.items():
            with flat_file(folder, name).open("wb") as file:
                append(file, values, dtype)
        (folder / _SPELLINGS).write_text(json.dumps(list(numbers)), encoding="utf-8")
        write_meta(folder, {"texts": len(self._texts), "words": len(kept), "candidates": width})

    def _reading(self, number: int) -> Masked:
        read = self._read[number]
        assert read is not None
        return read


def _places(text: str, read: Masked | None) -> list[Place]:
    if read is not None:
        return read.places
    return [Place(match.start(), match.end(), None) for match in _WORD.finditer(text)]


def _read_spellings(folder: Path) -> list[str]:
    try:
        spellings: list[str] = json.loads((folder / _SPELLINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"task.cache: {folder} is damaged; delete it and run again ({error})"
        ) from error
    return spellings
