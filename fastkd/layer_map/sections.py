"""The layer map: a word, a list of layers, or a section where a mapping has options."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag

from fastkd.section import (
    LARGEST,
    Section,
    Seed,
    short,
)

# between these fp32 tells scores over the temperature apart, and the kernels take them
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
MapKind = Literal[
    "uniform", "last", "first", "skip", "below_last", "final", "mean_target", "mean_loss"
]


class RandomMap(Section):
    """Sorted distinct teacher layers, drawn anew (RAIL-KD, arXiv 2109.10164)."""

    kind: Literal["random"] = "random"
    """Name of the mapping."""
    redraw: Literal["run", "epoch", "step"] = "epoch"
    """When other layers are drawn; `run` keeps the first draw."""
    seed: Seed | None = None
    """Seed of the draws; `train.seed` where not given."""


class TransportMap(Section):
    """All pairs, weighted by an exact transport (BERT-EMD, arXiv 2010.06133)."""

    kind: Literal["emd"] = "emd"
    """Name of the mapping."""
    temperature: Temperature | None = 1.0
    """Of the cost attention that moves the weights of the layers; `null` keeps them equal."""


class AttentionMap(Section):
    """A softmax over teacher layers mixes their states (ALP-KD, arXiv 2012.14022)."""

    kind: Literal["attention"] = "attention"
    """Name of the mapping."""
    temperature: Temperature = 1.0
    """What the dot products are divided by before the softmax."""


MAP_SECTIONS: dict[str, type[Section]] = {
    "random": RandomMap,
    "emd": TransportMap,
    "attention": AttentionMap,
}
_NAMES = (*get_args(MapKind), *MAP_SECTIONS)


def _known_map(value: object) -> object:
    if isinstance(value, Section):
        return value
    if isinstance(value, str) and value in MAP_SECTIONS:
        return {"kind": value}
    if isinstance(value, dict) and value.get("kind") in list(MAP_SECTIONS):
        return value
    layers = isinstance(value, list | tuple) and all(
        type(v) is int and 0 <= v <= LARGEST for v in value
    )
    # in a list: what is no word may have no hash
    if not layers and value not in list(get_args(MapKind)):
        raise ValueError(
            f"expected {', '.join(_NAMES)} or a list with one teacher layer for each student "
            f"layer, 0 for none; {', '.join(MAP_SECTIONS)} may be a section with that kind "
            f"(given {short(value)})"
        )
    return value


def _form(value: Any) -> str:
    if isinstance(value, str):
        return "name"
    if isinstance(value, list | tuple):
        return "list"
    kind: str = value["kind"] if isinstance(value, dict) else value.kind
    return kind


Layers = Annotated[
    Annotated[MapKind, Tag("name")]
    | Annotated[tuple[int, ...], Tag("list")]
    | Annotated[RandomMap, Tag("random")]
    | Annotated[TransportMap, Tag("emd")]
    | Annotated[AttentionMap, Tag("attention")],
    Discriminator(_form),
    BeforeValidator(_known_map),
]
