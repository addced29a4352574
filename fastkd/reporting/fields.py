"""`fastkd fields`: the fields of a file, one below the other."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from fastkd.errors import UserError
from fastkd.recipe.fields import WORDS, Entry
from fastkd.section import did_you_mean

_INDENT = "    "


def chosen_fields(entries: Iterable[Entry], key: str | None) -> list[Entry]:
    """The fields of a section, itself first; all fields of a name, or of what other trainers call
    so; or all there are.

    Raises:
        UserError: no field is called so.
    """
    every = list(entries)
    if key is None:
        return every
    found = _within(every, key) or [entry for entry in every if entry.key.endswith(f".{key}")]
    found = found or _within(every, WORDS.get(key, key))
    if not found:
        known = dict.fromkeys(part for e in every for part in (e.key, e.key.split(".")[-1]))
        raise UserError(
            f"no field {key!r}; {did_you_mean(key, known)}fastkd fields alone lists all of them"
        )
    return found


def _within(entries: Iterable[Entry], key: str) -> list[Entry]:
    return [entry for entry in entries if f"{entry.key}.".startswith(f"{key}.")]


def listed(entries: Iterable[Entry], width: int) -> str:
    """Fields as text of this width: the key, what it takes and its default, what it does."""
    lines = []
    for entry in entries:
        default = "required" if entry.default is None else f"default {entry.default}"
        about = [entry.takes, *([default] if entry.default != "" else [])]
        lines.append(f"{entry.key}: {'; '.join(about)}")
        lines += textwrap.wrap(
            entry.says, max(width, 40), initial_indent=_INDENT, subsequent_indent=_INDENT
        )
    return "\n".join(lines)
