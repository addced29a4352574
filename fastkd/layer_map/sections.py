"""The layer map in a recipe: a word, a list of layers or of pairs, or a section with options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from fastkd.section import (
    LARGEST,
    Section,
    Seed,
    read_as,
    short,
)

# between these fp32 tells scores over the temperature apart, and the kernels take them
COLDEST, HOTTEST = 1e-3, 1e3
Temperature = Annotated[float, Field(ge=COLDEST, le=HOTTEST)]
LayerWeights = Literal["cost", "softmax", "equal"]
MapKind = Literal[
    "uniform", "last", "first", "skip", "below_last", "final", "mean_target", "mean_loss"
]


def check_temperature_read(section: Section, reader: str, choice: str) -> None:
    """See that a section's `temperature` is not given where nothing reads it.

    Args:
        section: with that field.
        reader: the one choice that reads it.
        choice: the field that makes it.

    Raises:
        ValueError: it is given beside another choice.
    """
    values, default = dict(section), type(section).model_fields["temperature"].default
    chosen = values[choice]
    if chosen != reader and values["temperature"] != default:
        raise ValueError(
            f"temperature is read by {reader} only, but {choice} is {chosen}; leave it out"
        )


class MapConfig(Section):
    """What the section of every mapping has."""

    kind: str
    """Name of the mapping."""


class RandomSection(MapConfig):
    """Sorted distinct teacher layers, drawn anew (RAIL-KD, arXiv 2109.10164)."""

    kind: Literal["random"] = "random"
    """Name of the mapping."""
    redraw: Literal["run", "epoch", "step"] = "epoch"
    """When other layers are drawn; `run` keeps the first draw."""
    seed: Seed | None = None
    """Seed of the draws; `train.seed` where not given."""


class TransportSection(MapConfig):
    """All pairs, weighted by an exact transport (BERT-EMD, arXiv 2010.06133)."""

    kind: Literal["emd"] = "emd"
    """Name of the mapping."""
    layer_weights: LayerWeights = "cost"
    """How much of the flow each layer has: by what it costs, cheap ones more, as the official code
    divides it (`cost`) or by a `softmax`; or all as much (`equal`)."""
    temperature: Temperature = 1.0
    """Temperature of the `softmax`, whose scores are the layers' mean cost over the own one, of any
    depth."""
    total: float = Field(default=1.0, gt=0, le=1e6)
    """What all weights of pairs add up to; with the number of student layers it weighs as much as
    a mapping of one teacher layer each."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_temperature_read(self, "softmax", "layer_weights")
        return self


class AttentionSection(MapConfig):
    """A softmax over teacher layers mixes their states (ALP-KD, arXiv 2012.14022)."""

    kind: Literal["attention"] = "attention"
    """Name of the mapping."""
    temperature: Temperature = 1.0
    """What the dot products are divided by before the softmax."""


class LayerPair(Section):
    """One comparison: `[student, teacher]`, `[student, teacher, weight]`, or a section."""

    student: int = Field(ge=1)
    """Layer of the student, from 1."""
    teacher: int = Field(ge=1)
    """Layer of the teacher, from 1."""
    weight: float = Field(default=1.0, ge=0)
    """Factor of its loss."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple):
            return given
        if len(given) not in (2, 3):
            raise ValueError(
                f"expected [student layer, teacher layer], and perhaps a weight (given "
                f"{short(given)})"
            )
        return dict(zip(cls.model_fields, given, strict=False))


class PairsSection(MapConfig):
    """Pairs of layers, named one by one; a layer may stand in several."""

    kind: Literal["pairs"] = "pairs"
    """Name of the mapping."""
    pairs: tuple[LayerPair, ...]
    """What is compared, each with a weight."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if not self.pairs:
            raise ValueError("pairs is empty; name at least one, as in [[1, 2]]")
        found = [(pair.student, pair.teacher) for pair in self.pairs]
        twice = next((pair for pair in found if found.count(pair) > 1), None)
        if twice is not None:
            raise ValueError(
                f"pairs names student layer {twice[0]} with teacher layer {twice[1]} twice; name "
                "it once and give it a weight"
            )
        return self


MAP_SECTIONS: dict[str, type[MapConfig]] = {
    "random": RandomSection,
    "emd": TransportSection,
    "attention": AttentionSection,
    "pairs": PairsSection,
}
"""Mappings that may be sections, by name; `register_layer_map` adds to them."""


def is_map_name(name: str) -> bool:
    """Whether a mapping has this name."""
    return name in MAP_SECTIONS or name in get_args(MapKind)


def _read_map(value: object) -> object:
    """A word, layers, or the section that a mapping with options has."""
    if isinstance(value, Section):
        return value
    section = _as_section(value)
    if section is not None:
        kind = section["kind"]
        # under the mapping's name, which a complaint then says the section of
        return read_as(MAP_SECTIONS[kind], kind, section)
    if isinstance(value, str) and value in get_args(MapKind):
        return value
    layers = isinstance(value, list | tuple) and all(
        type(v) is int and 0 <= v <= LARGEST for v in value
    )
    if not layers:
        with_options = ", ".join(name for name in MAP_SECTIONS if name != "pairs")
        raise ValueError(
            f"expected {', '.join(get_args(MapKind))}, {with_options} or a list with one teacher "
            f"layer for each student layer, 0 for none; {with_options} may be a section with that "
            f"kind, and pairs a list of [student layer, teacher layer] (given {short(value)})"
        )
    return value


def _as_section(value: object) -> dict[str, Any] | None:
    """The mapping of keys that a section is given as, `None` where it is none."""
    if isinstance(value, str) and value in MAP_SECTIONS and value != "pairs":
        return {"kind": value}
    if isinstance(value, Mapping):
        kind = value.get("kind", "pairs" if "pairs" in value else None)
        return {**value, "kind": kind} if isinstance(kind, str) and kind in MAP_SECTIONS else None
    listed = list(value) if isinstance(value, list | tuple) else []
    # of pairs, not of layers
    if listed and all(isinstance(v, list | tuple | Mapping) and v for v in listed):
        return {"kind": "pairs", "pairs": value}
    return None


Layers = Annotated[
    str | tuple[int, ...] | SerializeAsAny[MapConfig],
    BeforeValidator(_read_map),
]
