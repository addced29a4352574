"""Fields of a file as tables, from the walk that `fastkd fields` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby

from markup import bullets, code, linked, page, section, table

from fastkd.recipe import FinetuneRecipe, Recipe
from fastkd.recipe.fields import Entry, fields_of
from fastkd.section import Section
from fastkd.study.spec import StudySpec

FOLDER = "reference/fields"
FILES: dict[str, tuple[type[Section], str]] = {
    "distill": (Recipe, "A recipe of `fastkd distill`."),
    "finetune": (FinetuneRecipe, "A recipe of `fastkd finetune`."),
    "study": (StudySpec, "A study of `fastkd study`."),
}
_STAR = "A `*` in a key stands for a name that the file gives, or for each of several."


@cache
def recipe_fields() -> tuple[Entry, ...]:
    """The fields of `fastkd distill`, which many pages show some of."""
    return tuple(fields_of(Recipe))


def field_pages() -> Iterator[tuple[str, str]]:
    """Path and text of the index and of one page for each kind of file."""
    said = [f"[{name}]({name}.md): {about}" for name, (_, about) in FILES.items()]
    yield (
        f"{FOLDER}/index.md",
        page(
            "Fields",
            "Every field of the files that the commands read, as `fastkd fields` lists them.",
            bullets(said),
        ),
    )
    for name, (root, about) in FILES.items():
        parts = [
            section(f"`{top}`", fields_table(entries))
            for top, entries in groupby(fields_of(root), key=lambda entry: _top(entry.key))
        ]
        yield f"{FOLDER}/{name}.md", page(f"Fields of {name}", about, _STAR, *parts)


def fields_table(entries: Iterable[Entry], below: str = "") -> str:
    """A table of fields, or of those whose key begins so; empty where there are none.

    Args:
        entries: fields, in order.
        below: what keys begin with, which is left out of them.
    """
    rows = [
        (code(entry.key.removeprefix(below)), entry.takes, _default(entry), linked(entry.says))
        for entry in entries
        if entry.key.startswith(below)
    ]
    return table(("field", "takes", "default", "what it does"), rows) if rows else ""


def keys_table(entries: Iterable[Entry]) -> str:
    """A table of what a file holds that nobody writes by hand."""
    rows = [
        (code(entry.key), entry.takes.replace("a section", "an object"), entry.says)
        for entry in entries
    ]
    return table(("key", "holds", "what it is"), rows)


def _top(key: str) -> str:
    """The part of a file that a key stands in: its section and, of losses, the loss."""
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0] == "losses" and len(parts) > 2 else parts[0]


def _default(entry: Entry) -> str:
    return "required" if entry.default is None else code(entry.default)
