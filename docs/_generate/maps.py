"""A page for each layer map: what it pairs, its options, and what it comes to for two depths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from entries import fields_table
from losses import presets_link, presets_with
from markup import bullets, code, line, linked, page, prose, section, table
from messages import refusals

from fastkd.layer_map import LayerMap, Progress, make_layer_map
from fastkd.layer_map.base import CONVENTION
from fastkd.layer_map.sections import MAP_SECTIONS, LayerPair, MapConfig, MapKind, PairsSection
from fastkd.recipe.fields import fields_of

FOLDER = "reference/maps"
DEPTHS = ((3, 6), (4, 12))
EPOCHS = 4
Given = str | Sequence[int] | MapConfig


def map_names() -> tuple[str, ...]:
    """Everything that `layer_map` of a recipe takes, lists under the name `list`."""
    ours = (name for name, config in MAP_SECTIONS.items() if _is_ours(config))
    return (*get_args(MapKind), *ours, "list")


def map_pages() -> Iterator[tuple[str, str]]:
    """Path and text of the index and of every layer map of fastkd."""
    rows = [
        (f"[`{name}`]({name}.md)", line(prose(type(_built(name, 3, 6)))), _targets(name, 3, 6))
        for name in map_names()
    ]
    everywhere = refusals([make_layer_map], {})
    yield (
        f"{FOLDER}/index.md",
        page(
            "Layer maps",
            f"`layer_map` of a recipe, or of one loss. {CONVENTION[0].upper()}{CONVENTION[1:]}. "
            "[A layer map of your own](../../extend/map.md) is a class in a file.",
            table(("layer_map", "what it pairs", "teacher layers of 3 student layers, of 6"), rows),
            section("What is refused", bullets(map(code, everywhere))),
        ),
    )
    for name in map_names():
        yield f"{FOLDER}/{name}.md", _page_of(name)


def _page_of(name: str) -> str:
    config = MAP_SECTIONS.get(name)
    options = "" if config is None else fields_table(fields_of(config))
    made = "".join(
        f"\nA student of {student} layers, a teacher of {teacher}:\n\n"
        + table(("student layer", "learns from"), _rows(name, student, teacher))
        + _draws(_built(name, student, teacher))
        for student, teacher in DEPTHS
    )
    sources = [] if config is None else [config, LayerPair] if name == "pairs" else [config]
    return page(
        f"`{name}`",
        prose(type(_built(name, *DEPTHS[0]))),
        section("Options", options),
        section("Presets", presets_link(presets_with(lambda tree: _kind(tree) == name))),
        section("What it comes to", made),
        section("What is refused", bullets(map(code, refusals(sources, {})))),
    )


def _kind(tree: dict[str, object]) -> object:
    given = tree.get("layer_map")
    return given.get("kind") if isinstance(given, dict) else given


def _built(name: str, student: int, teacher: int) -> LayerMap:
    given: Given = name
    last = tuple(teacher - student + layer for layer in range(1, student + 1))
    if name == "list":
        given = last
    elif name == "pairs":
        weights = (1.0, *(0.5 for _ in last[1:]))
        each = zip(range(1, student + 1), last, weights, strict=True)
        given = PairsSection(
            pairs=tuple(LayerPair(student=s, teacher=t, weight=w) for s, t, w in each)
        )
    elif name in MAP_SECTIONS:
        given = MAP_SECTIONS[name](kind=name)
    return make_layer_map(given, student, teacher)


def _rows(name: str, student: int, teacher: int) -> list[tuple[str, str]]:
    rows = _built(name, student, teacher).rows()
    return [(str(layer), "-" if said is None else linked(str(said))) for layer, said in rows]


def _draws(layers: LayerMap) -> str:
    """Of a map that changes, what it comes to in the first passes over the data."""
    if not layers.moves:
        return ""
    moments = (Progress(epoch=epoch) for epoch in range(EPOCHS))
    rows = [
        (str(at.epoch), ", ".join(str(link.teachers[0]) for link in layers.links(at)))
        for at in moments
    ]
    return "\n" + table(("epoch", "teacher layers, with seed 0"), rows)


def _targets(name: str, student: int, teacher: int) -> str:
    return "; ".join(said for _, said in _rows(name, student, teacher))


def _is_ours(config: type[MapConfig]) -> bool:
    return config.__module__.startswith("fastkd.")
