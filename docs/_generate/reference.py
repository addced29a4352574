"""All pages of the reference by path, and their place in the navigation.

They are made from registries, sections of recipes and docstrings whenever the site is built, so
that there is nothing to go stale. The road not taken: pages that are written and checked against
the code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from commands import api_pages, command_pages
from entries import field_pages
from losses import loss_pages
from maps import map_pages
from markup import bullets, page
from records import record_pages
from weights import preset_pages, weight_pages

FOLDER = "reference"
SECTIONS: dict[str, tuple[str, str]] = {
    "Losses": ("losses", "what may be compared"),
    "Layer maps": ("maps", "which layers are compared"),
    "Weights": ("weights", "what losses are multiplied with"),
    "Presets": ("presets.md", "published methods in one word"),
    "Fields": ("fields", "every field of a recipe and of a study"),
    "Command line": ("commands.md", "commands and their options"),
    "Python": ("python", "functions and classes"),
    "Files of a run": ("records.md", "what metrics.jsonl and summary.json hold"),
}
"""Title of every section, where its page or its index stands, and what it is about."""


@cache
def pages() -> dict[str, str]:
    """Markdown of every page of the reference by its path within the documentation."""
    makers = (
        *(loss_pages, map_pages, weight_pages, preset_pages),
        *(field_pages, command_pages, api_pages, record_pages),
    )
    made = {path: text for maker in makers for path, text in maker()}
    links = bullets(
        f"[{title}]({_index(place)}): {about}" for title, (place, about) in SECTIONS.items()
    )
    about = "Made from the code of this version, so that it says what that does."
    return {f"{FOLDER}/index.md": page("Reference", about, links), **made}


def navigation() -> list[Any]:
    """The section of the navigation, as mkdocs.yml would have it."""
    made = pages()
    entries: list[Any] = [f"{FOLDER}/index.md"]
    for title, (place, _) in SECTIONS.items():
        index = f"{FOLDER}/{_index(place)}"
        below = [path for path in made if path.startswith(f"{FOLDER}/{place}/") and path != index]
        entries.append(
            {title: [index, *({_title(path): path} for path in below)] if below else index}
        )
    return entries


def _index(place: str) -> str:
    return place if place.endswith(".md") else f"{place}/index.md"


def _title(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".md")
