"""HTML that needs nothing beside it and runs nothing: what comes from outside is text.

A page shows names, labels, paths and whole files that strangers may have written. All of them go
through `escaped`, and a content security policy lets the browser load and run nothing at all
should one have been forgotten.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from fastkd.errors import printable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
"""
# pictures stand in the page itself, and so does its style
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page.

    Args:
        title: as text.
        body: as HTML.
        style: CSS beside the common one.
    """
    named = escaped(title)
    head = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{named}</title><style>{STYLE}{style}</style></head><body>",
        f"<h1>{named}</h1>",
    ]
    return "\n".join([*head, *body, "</body></html>"])


def escaped(text: str) -> str:
    """Text as HTML shows it, in an element or in an attribute in quotes; lines stay lines."""
    return html.escape("".join(c if c in "\n\t" else printable(c) for c in text))


def shortened(text: str, most: int = 40) -> str:
    """Text that a picture has room for: its beginning and its end."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells; the first column is left, the others are right."""
    head = "".join(f"<th>{escaped(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def markdown(text: str) -> str:
    """Text as Markdown shows it: no HTML, no link, no end of a table's cell."""
    plain = html.escape(printable(text), quote=False)
    return plain.replace("|", "\\|").replace("](", "]\\(").replace("][", "]\\[")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table of text cells; the first column is left, the others are right."""
    ruler = [":--", *("--:" for _ in columns[1:])]
    return [f"| {' | '.join(map(markdown, cells))} |" for cells in (columns, ruler, *rows)]


def fenced(text: str, language: str = "") -> list[str]:
    """Lines of a block of code in Markdown that holds a text, whatever backticks it has."""
    plain = "".join(c if c in "\n\t" else printable(c) for c in text)
    longest = max((len(run) for run in re.findall("`+", plain)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *plain.rstrip().split("\n"), fence]
