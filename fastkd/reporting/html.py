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
from fastkd.reporting.style import STYLE

# pictures stand in the page itself, and so does its style
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def document(title: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: as text.
        body: as HTML.
    """
    named = escaped(title)
    head = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{named}</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{STYLE}</style></head><body><main>",
        f"<h1>{named}</h1>",
    ]
    return "\n".join([*head, *body, "</main></body></html>"])


def escaped(text: str) -> str:
    """Text as HTML shows it, in an element or in an attribute in quotes; lines stay lines."""
    return html.escape("".join(c if c in "\n\t" else printable(c) for c in text))


def shortened(text: str, most: int = 40) -> str:
    """Text that a picture has room for: its beginning and its end."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def html_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "numbers"
) -> str:
    """A table of text cells, which scrolls by itself where it is wide; the first column is left and
    names its row, the others are right.

    Args:
        columns: their heads; none of them has text where the rows need no heads.
        rows: as long as the heads.
        caption: what is said of it to those who don't see it.
    """
    heads = "".join(
        f"<th scope='col'>{escaped(column)}</th>" if column else "<td></td>" for column in columns
    )
    head = f"<thead><tr>{heads}</tr></thead>" if any(columns) else ""
    body = "".join(
        f"<tr><th scope='row'>{escaped(first)}</th>"
        + "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    return scrolling(f"<table>{head}<tbody>{body}</tbody></table>", caption)


def scrolling(content: str, caption: str) -> str:
    """HTML that may be wider than the page, in a part that scrolls, also by keys.

    Args:
        content: as HTML.
        caption: what is said of it to those who don't see it.
    """
    region = f"role='region' tabindex='0' aria-label='{escaped(caption)}'"
    return f"<div class='scroll' {region}>{content}</div>"


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
