"""Which documents are trained on and which are held out, decided by their text alone.

A hash of the text decides, not a draw: the answer is the same in every run and on every rank,
streaming or not, and two identical documents never fall on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from fastkd.data.text.files import Source
from fastkd.data.text.settings import TextSettings
from fastkd.data.text.tokenize import Part


class Split:
    """Training and held-out documents of a set of sources."""

    def __init__(
        self, data: TextSettings, train: list[Source], heldout: list[Source] | None
    ) -> None:
        self.train_sources = train
        self._heldout_sources = heldout
        self._fraction = data.heldout_fraction
        self._known: set[bytes] = set()
        self.dropped = 0
        """Training documents met that are also in `data.heldout`."""

    def files(self) -> Iterator[Path]:
        """The files of all sources, in their order."""
        for source in (*self.train_sources, *(self._heldout_sources or ())):
            yield from source.stored_in()

    def documents(self) -> Iterator[tuple[Part, str]]:
        """All documents, each once."""
        if self._heldout_sources is not None:
            yield from (("heldout", text) for text in self.remember_heldout())
        yield from self.labelled(self.train_sources)

    def heldout(self) -> Iterator[str]:
        """The held-out documents alone."""
        if self._heldout_sources is not None:
            return self.remember_heldout()
        return (text for part, text in self.labelled(self.train_sources) if part == "heldout")

    def remember_heldout(self) -> Iterator[str]:
        """Documents of `data.heldout`, noted so that training leaves them out."""
        for text in _chained(self._heldout_sources or []):
            self._known.add(content_hash(text))
            yield text

    def labelled(self, sources: Iterable[Source]) -> Iterator[tuple[Part, str]]:
        """Documents of training sources with their part; those in `data.heldout` are dropped."""
        for text in _chained(sources):
            if self._heldout_sources is None:
                yield ("heldout" if is_held_out(text, self._fraction) else "train"), text
            elif content_hash(text) in self._known:
                self.dropped += 1
            else:
                yield "train", text


def _chained(sources: Iterable[Source]) -> Iterator[str]:
    return chain.from_iterable(source.documents() for source in sources)


def content_hash(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text is of the share of texts that is held out."""
    return int.from_bytes(content_hash(text)[:8]) < fraction * 2**64
