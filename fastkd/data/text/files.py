"""Documents from text, JSON lines and Python's own help topics, each a `Source`; those that have
columns are `Records`.

These are read here rather than by the builders of `datasets`, which report a bad byte or row
without its place, split documents at chunk borders of CRLF files, and leave files in the user's
home folder. Parquet, saved folders and the hub go through `datasets` (tables.py).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from fastkd.errors import UserError, is_text
from fastkd.files.sealed import file_sha256
from fastkd.types import Unit

DOCUMENT_LIMIT = 1 << 24
"""Bytes of the longest line or document of a text file; tokenising takes about 140 times that."""
QUICK_BYTES = 1 << 16
"""Bytes at each end of a file that a quick digest reads."""


TEXT_COLUMN = "data.text_column"
"""Field that names the column of a document."""


class Source(ABC):
    """Documents in a fixed order; every call of `documents` starts from the first one."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents that are not blank."""

    @abstractmethod
    def digest(self, *, quick: bool) -> str:
        """Key of the content and of how it is read; `quick` reads sizes, heads and tails only."""

    @abstractmethod
    def called(self) -> str:
        """What it is called in messages."""

    def stored_in(self) -> Sequence[Path]:
        """The files that documents are read from, as far as there are any here."""
        return ()


class Records(Source):
    """Rows with named columns, of which one holds the documents."""

    column: str

    @abstractmethod
    def records(
        self, columns: Sequence[str], field: str = TEXT_COLUMN
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """All rows that are not blank, each with its place.

        Args:
            columns: that a row has, at least.
            field: of the recipe that names them.

        Raises:
            UserError: one that a row lacks, or what can't be read.
        """

    def documents(self) -> Iterator[str]:
        for where, row in self.records((self.column,)):
            text = checked_text(row[self.column], self.column, where)
            if text.strip():
                yield text


@dataclass(frozen=True)
class OneFile(Source):
    """What a single file holds."""

    path: Path

    def called(self) -> str:
        return str(self.path)

    def stored_in(self) -> Sequence[Path]:
        return (self.path,)


@dataclass(frozen=True)
class TextFile(OneFile):
    """UTF-8 text, plain or gzipped; line ends may be LF, CRLF or CR."""

    unit: Unit

    def documents(self) -> Iterator[str]:
        if self.unit in ("line", "row"):
            return (line for line in text_lines(self.path) if line.strip())
        return self._paragraphs()

    def _paragraphs(self) -> Iterator[str]:
        held: list[str] = []
        length = 0
        for line in text_lines(self.path):
            if line.strip():
                held.append(line)
                length += len(line)
            elif held:
                yield "\n".join(held)
                held, length = [], 0
            if length > DOCUMENT_LIMIT:
                raise UserError(
                    f"{self.path}: more than {DOCUMENT_LIMIT >> 20} MiB without an empty line, "
                    "which ends a document; set data.documents to line"
                )
        if held:
            yield "\n".join(held)

    def digest(self, *, quick: bool) -> str:
        return f"text {self.unit} {file_digest(self.path, quick=quick)}"


@dataclass(frozen=True)
class JsonLines(OneFile, Records):
    """One JSON object a line, plain or gzipped."""

    column: str

    def records(
        self, columns: Sequence[str], field: str = TEXT_COLUMN
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for where, row in json_objects(self.path):
            require_columns(columns, list(row), where, field)
            yield where, row

    def digest(self, *, quick: bool) -> str:
        return f"jsonl {self.column} {file_digest(self.path, quick=quick)}"


@dataclass(frozen=True)
class PythonDocs(Source):
    """The help topics inside every Python, one topic a document."""

    def documents(self) -> Iterator[str]:
        return (text for text in _python_topics().values() if text.strip())

    def digest(self, *, quick: bool) -> str:
        content = json.dumps(_python_topics()).encode()
        return f"python-docs {hashlib.sha256(content).hexdigest()}"

    def called(self) -> str:
        return "python-docs"


def file_digest(path: Path, *, quick: bool) -> str:
    """sha256 of a file's bytes, or of its size and two ends."""
    try:
        if not quick:
            return file_sha256(path)
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(QUICK_BYTES)
            file.seek(max(0, size - QUICK_BYTES))
            return hashlib.sha256(f"{size} ".encode() + head + file.read()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def require_unchanged(sources: Sequence[Source], digests: Sequence[str], *, quick: bool) -> None:
    """Raise unless sources that were read are what their digests were made of.

    Args:
        sources: as `digests` has them.
        digests: made before they were read.
        quick: as the digests were made.

    Raises:
        UserError: one of them was changed in between, so that nothing tells what was read.
    """
    for source, digest in zip(sources, digests, strict=True):
        if source.digest(quick=quick) != digest:
            raise changed_meanwhile(source.called())


def changed_meanwhile(name: str) -> UserError:
    """What is said of a file that another process wrote to while this one read it."""
    return UserError(
        f"{name}: it changed while it was read, so nothing of it was kept; run again once nothing "
        "writes to it"
    )


def require_columns(columns: Sequence[str], names: Sequence[str], where: str, field: str) -> None:
    """Raise unless the columns are there, each once, which `field` of the recipe names."""
    require_once(columns, names, where)
    for column in columns:
        if column not in names:
            raise UserError(
                f"{where}: no column {column!r}; it has {', '.join(map(repr, names)) or 'none'}: "
                f"set {field} to {'one' if field == TEXT_COLUMN else 'some'} of them"
            )


def require_once(columns: Iterable[str], names: Sequence[str], where: str) -> None:
    """Raise where one of the columns stands twice."""
    for column in columns:
        if names.count(column) > 1:
            raise UserError(f"{where}: column {column!r} stands twice; rename one of them")


def number_in(value: object) -> float:
    """The number that a cell holds or spells; NaN where it is none.

    Of Python's spellings those with underscores are none: `1_000` may be any number.
    """
    if isinstance(value, bool) or not isinstance(value, str | float | int | Decimal):
        return math.nan
    if isinstance(value, str) and "_" in value:
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def checked_text(value: object, column: str, where: str) -> str:
    """The value, if it is text that UTF-8 can hold."""
    if is_conversation(value):
        raise UserError(
            f"{where}: column {column!r} holds a conversation, expected text; write what "
            "tokenizer.apply_chat_template(..., tokenize=False) makes of it into a column of text"
        )
    if not isinstance(value, str):
        given = "null" if value is None else type(value).__name__
        raise UserError(
            f"{where}: column {column!r} holds {given}, expected text; remove or fill such rows"
        )
    if not is_text(value):
        raise UserError(
            f"{where}: column {column!r} holds half a surrogate pair, which is no text; "
            "repair or remove such rows"
        )
    return value


def is_conversation(value: object) -> bool:
    """Whether it is a list of messages as chat templates take them."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and each.keys() >= {"role", "content"} for each in value)
    )


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file with one a line, each with its place; blank lines are passed over.

    Raises:
        UserError: the file can't be read, or a line is no JSON object or has a key twice.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = decoder.decode(line)
        # ValueError: a number too long to be read, too
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, not {type(row).__name__}")
        yield where, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} stands twice in one object")
    return row


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, plain or gzipped, without their ends: LF, CRLF or CR.

    Raises:
        UserError: the file can't be read, or a byte, named with its place, is not UTF-8.
    """
    offset = passed = 0
    zipped = path.suffix.lower() == ".gz"
    try:
        # gzip takes a file that was never written for one without text
        if zipped and path.stat().st_size == 0:
            raise EOFError("it has no bytes")
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            while raw := file.readline(DOCUMENT_LIMIT):
                if len(raw) == DOCUMENT_LIMIT:
                    raise UserError(
                        f"{path}: a line of more than {DOCUMENT_LIMIT >> 20} MiB after byte "
                        f"{offset}; expected text with line ends, so split it first"
                    )
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    number = passed + 1 + raw.count(b"\r", 0, error.start)
                    raise UserError(
                        f"{path}, line {number}: byte {offset + error.start} is not UTF-8 "
                        f"(0x{raw[error.start]:02x}); convert the file to UTF-8 first"
                    ) from error
                if offset == 0:
                    line = line.removeprefix("\ufeff")
                offset += len(raw)
                lines = line.removesuffix("\n").removesuffix("\r").split("\r")
                passed += len(lines)
                yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _python_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "data: python-docs is not in this Python (module pydoc_data is missing); name a text "
            "file or install the full standard library"
        ) from error
    return topics
