"""What the values of a study are called: for people, and as folders.

A name tells values apart by their exact value and type, also `1` and `"1"`, or two numbers that
`%g` shows alike. A folder's name is the name itself where every file system takes it, else so much
of it as is safe, with a digest of the whole.
"""

from __future__ import annotations

import hashlib
import re

Level = str | int | float

# bytes of a folder's name that file systems take, less what stands beside it
_LONGEST = 200
_KEPT = 60
_PLAIN = re.compile(r"[A-Za-z0-9_.+=,@ -]+", re.ASCII)
# what a condition's name is put together with, and what quotes a value
_MARKS = frozenset(",='\"")


def candidate_name(number: int) -> str:
    """What a search calls a candidate, also its folder."""
    return f"trial-{number:04d}"


def is_candidate_name(name: str) -> bool:
    """Whether a search may call a candidate so."""
    return bool(re.fullmatch(r"trial-\d{4,}", name))


def shown(value: Level) -> str:
    """A level as its name; text that could be taken for something else stands in quotes."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, int):
        return str(value)
    return value if _is_plain(value) else repr(value)


def folder_name(name: str) -> str:
    """One part of a path that stands for a name and for no other.

    It holds no separator, is none of `.` and `..`, and is short enough for every file system.
    """
    plain = _PLAIN.fullmatch(name) and name == name.strip() and name.strip(".")
    if plain and len(name) <= _LONGEST:
        return name
    kept = re.sub(r"[^A-Za-z0-9_=,-]+", "-", name)[:_KEPT]
    return f"{kept}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"


def axis_table(axis: str, task: str | None = None) -> str:
    """What the files of an axis' table and picture are called, of all tasks or of one."""
    return f"axis-{axis}" + ("" if task is None else f"-{task}")


def axes_map(one: str, two: str) -> str:
    """What the picture of two axes is called."""
    return f"map-{one}-{two}"


def same_level(one: Level, other: Level) -> bool:
    """Whether two levels are the same value of the same kind: text, or a number."""
    return isinstance(one, str) == isinstance(other, str) and one == other


def _is_plain(text: str) -> bool:
    if not text or text != text.strip() or not text.isprintable() or _MARKS & set(text):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False
