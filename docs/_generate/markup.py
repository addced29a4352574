"""Docstrings and tables as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence

_ARXIV = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")
_SECTIONS = re.compile(r"^(Args|Returns|Raises|Yields):$", flags=re.MULTILINE)


def prose(documented: object) -> str:
    """What a docstring says in words, without its sections on arguments; papers are links."""
    text = _SECTIONS.split(inspect.getdoc(documented) or "")[0].strip()
    return linked(text)


def line(text: str) -> str:
    """The first paragraph of a text, in one line."""
    return " ".join(text.split("\n\n")[0].split())


def linked(text: str) -> str:
    """A text whose papers are links."""
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars within cells are written out."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines) + "\n"


def page(title: str, *parts: str) -> str:
    """A page of parts, without the empty ones."""
    return "\n\n".join([f"# {title}", *(part.strip("\n") for part in parts if part)]) + "\n"


def section(title: str, body: str) -> str:
    """A part with a title, nothing where it would be empty."""
    return f"## {title}\n\n{body}" if body.strip() else ""


def bullets(lines: Iterable[str]) -> str:
    """A list of one line each."""
    return "\n".join(f"- {one}" for one in lines)


def code(text: str) -> str:
    """A word or a line as code."""
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    # within code a bar ends no cell, and Markdown would show the backslash
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part[:1] == "`" else part.replace("|", "\\|") for part in parts)
