"""What `modules.json` of a sentence-transformers folder lists, checked before a path is followed.

The file comes with the model, so its paths are a stranger's: each must stay inside the folder.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.errors import is_text, one_line

LIBRARY = "sentence_transformers."
# more than any model has, and less than fills a terminal
_MOST = 64
# of a path; file systems take 255 bytes of each of its parts
_LONGEST = 200


class ListingError(ValueError):
    """A listing that can't be read or leads out of its folder; the message is one line."""


@dataclass(frozen=True)
class Module:
    """One entry of modules.json."""

    entry: dict[str, Any]

    @property
    def kind(self) -> str:
        """Name of its class."""
        return str(self.entry["type"]).rsplit(".", 1)[-1]

    @property
    def path(self) -> str:
        """Its folder in the teacher's, empty where it is the teacher's own."""
        return str(self.entry["path"])

    @property
    def is_known(self) -> bool:
        """Whether the library has its code, rather than the model's folder."""
        return str(self.entry["type"]).startswith(LIBRARY)

    @property
    def stays_inside(self) -> bool:
        """Whether its path leads to no place outside of the folder that lists it."""
        parts = re.split(r"[\\/]", self.path)
        plain = self.path.isprintable() and len(self.path.encode()) <= _LONGEST
        return plain and ".." not in parts and not _is_rooted(self.path)


def read_modules(listing: Path) -> list[Module]:
    """The entries of a listing, in order.

    Raises:
        ListingError: it is no list of objects that have a type and a path.
    """
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))
    # ValueError: no UTF-8, no JSON, or a number too long to be read
    except (OSError, ValueError, RecursionError) as error:
        raise ListingError(f"modules.json can't be read: {one_line(error)}") from error
    if not isinstance(entries, list) or len(entries) > _MOST:
        raise ListingError(f"modules.json can't be read: expected a list of at most {_MOST}")
    for entry in entries:
        words = [entry.get(key) for key in ("type", "path")] if isinstance(entry, dict) else []
        if not words or not all(isinstance(word, str) and is_text(word) for word in words):
            raise ListingError("modules.json can't be read: expected objects with type and path")
    return [Module(entry) for entry in entries]


def first_folder(listing: Path) -> str:
    """The folder of the first module, seen from the listing's.

    Raises:
        ListingError: there is none, or it lies elsewhere.
    """
    modules = read_modules(listing)
    if not modules:
        raise ListingError("modules.json lists no module")
    if not modules[0].stays_inside:
        raise ListingError(f"modules.json leads out of its folder, to {modules[0].path!r:.200}")
    return modules[0].path


def _is_rooted(path: str) -> bool:
    return path.startswith(("/", "\\", "~")) or path[1:2] == ":"
