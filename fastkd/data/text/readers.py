"""Readers of text from outside: a format that fastkd doesn't know, by its suffix or its name.

    @register_reader(".md")
    def markdown(place: str) -> Iterator[str]: ...

    @register_reader("mail")
    def mailbox(place: str) -> Iterator[str]: ...

`data.train: notes.md` is then read by the first, `data.train: mail:/var/mail/me` by the second.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fastkd.data.text.files import Source, file_digest
from fastkd.errors import UserError, is_text
from fastkd.plugins import note_source, place_of, plugin_errors, source_digest

Reader = Callable[[str], Iterable[str]]
"""From a path, or from what stands behind `NAME:`, to documents: the same ones in the same order
whenever it is called."""

KNOWN = (
    *(".txt", ".txt.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz"),
    *(".jsonl", ".jsonl.gz", ".parquet"),
)
"""Suffixes that fastkd reads itself."""
# of documents that are no file, a quick digest reads this many
_QUICK_DOCUMENTS = 64
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_SUFFIX = re.compile(r"(\.[a-z0-9_-]+)+")
_readers: dict[str, Reader] = {}


def register_reader(form: str) -> Callable[[Reader], Reader]:
    """Let a function read the text of `data.train` and `data.heldout`; used as a decorator.

    Args:
        form: a suffix with its dot, in small letters, as `.md`; or a name, as `mail`, which stands
            before a colon.

    Raises:
        UserError: neither, or one that is taken; or what is to read it is no function or class.
    """
    pattern = _SUFFIX if str(form).startswith(".") else _NAME
    if not isinstance(form, str) or not pattern.fullmatch(form):
        raise UserError(
            f"reader {form!r}: expected a suffix such as '.md' or a name such as 'mail'"
        )

    def register(reader: Reader) -> Reader:
        # by its module and name the cache and messages know it; a partial has none of its own
        if not callable(reader) or not hasattr(reader, "__qualname__"):
            raise UserError(
                f"reader {form!r}: a {type(reader).__name__} has no name; give a function (def)"
            )
        taken = _readers.get(form)
        if form in KNOWN or (taken is not None and place_of(taken) != place_of(reader)):
            by = "fastkd" if taken is None else place_of(taken)
            raise UserError(f"reader {form!r}: {by} reads it already; give another name")
        _readers[form] = reader
        note_source(reader)
        return reader

    return register


def registered_suffixes() -> tuple[str, ...]:
    """The suffixes of registered readers."""
    return tuple(form for form in _readers if form.startswith("."))


def by_name(name: str) -> Source | None:
    """What `FORMAT:PLACE` names; `None` where no reader has the name."""
    form, colon, place = name.partition(":")
    known = bool(colon) and not form.startswith(".") and form in _readers
    return Registered(form, place, _readers[form]) if known else None


def by_suffix(path: Path) -> Source | None:
    """What a file holds; `None` where no reader has its suffix."""
    forms = [form for form in registered_suffixes() if path.name.lower().endswith(form)]
    if not forms:
        return None
    # .tar.md before .md
    form = max(forms, key=len)
    return Registered(form, str(path), _readers[form])


@dataclass(frozen=True)
class Registered(Source):
    """Documents from a reader from outside."""

    form: str
    place: str
    reader: Reader

    def called(self) -> str:
        return self.place if self.form.startswith(".") else f"{self.form}:{self.place}"

    def documents(self) -> Iterator[str]:
        remedy = "; mend the file or the reader"
        with plugin_errors(f"data: {self.called()}", self.reader, remedy=remedy):
            where = f"data: {self.called()}: reader {place_of(self.reader)} gave"
            found = self.reader(self.place)
            # a text would give its characters, a table the names of its columns
            if isinstance(found, str | bytes | Set) or hasattr(found, "keys"):
                raise UserError(
                    f"{where} {type(found).__name__}, expected documents in an order: a list of "
                    "texts, or yield each"
                )
            for number, text in enumerate(found, start=1):
                if not isinstance(text, str) or not is_text(text):
                    given = type(text).__name__ if not isinstance(text, str) else "half a character"
                    raise UserError(f"{where} {given} as document {number}, expected text")
                if text.strip():
                    yield text

    def digest(self, *, quick: bool) -> str:
        files, source = self.stored_in(), source_digest(self.reader)
        who = f"{self.form} {place_of(self.reader)}"
        if files and source is not None:
            return f"{who} {source} {file_digest(files[0], quick=quick)}"
        found = hashlib.sha256(self.place.encode())
        for text in islice(self.documents(), _QUICK_DOCUMENTS if quick else None):
            found.update(hashlib.sha256(text.encode()).digest())
        return f"{who} {found.hexdigest()}"

    def stored_in(self) -> Sequence[Path]:
        path = Path(self.place).expanduser()
        return (path,) if path.is_file() else ()
