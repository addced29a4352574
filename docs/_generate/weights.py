"""A page for each way of weighting losses, and one of the published methods that fill them in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from entries import fields_table
from markup import bullets, code, line, page, prose, section, table

from fastkd.losses.weighting import Ratio, Uncertainty, factor
from fastkd.recipe.fields import fields_of
from fastkd.recipe.presets import PRESETS
from fastkd.recipe.weights import Balance, LossConfig, Schedule
from fastkd.recipe.yaml_text import write_yaml

FOLDER = "reference/weights"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_BALANCES = {
    "constant": "Every loss counts as its own `weight` says, whatever its size.",
    "ratio": prose(Ratio),
    "uncertainty": prose(Uncertainty),
}


def weight_pages() -> Iterator[tuple[str, str]]:
    """Path and text of the index and of every weighting."""
    kinds = get_args(Balance.model_fields["kind"].annotation)
    rows = [(f"[`balance: {kind}`]({kind}.md)", line(_BALANCES[kind])) for kind in kinds]
    rows.append(("[`schedule`](schedule.md)", line(prose(factor))))
    yield (
        f"{FOLDER}/index.md",
        page(
            "Weights",
            "The total is the sum of all losses, each times its `weight`, what its `schedule` says "
            "at this step, and what `losses.balance` makes of its size. Pairs of layers have "
            "weights of their own in a [layer map of pairs](../maps/pairs.md), classes in "
            "`task.class_weights`.",
            table(("weighting", "what it does"), rows),
        ),
    )
    for kind in kinds:
        read = [entry for entry in fields_of(Balance) if f"`{kind}`" in entry.says]
        own = fields_table(fields_of(LossConfig) if kind == "constant" else read)
        yield (
            f"{FOLDER}/{kind}.md",
            page(
                f"`{kind}`",
                _BALANCES[kind],
                section("Fields of a loss" if kind == "constant" else "Fields of balance", own),
            ),
        )
    yield (
        f"{FOLDER}/schedule.md",
        page(
            "`schedule`",
            prose(factor),
            section("Fields", fields_table(fields_of(Schedule))),
            section("What it comes to", _factors()),
        ),
    )


def preset_pages() -> Iterator[tuple[str, str]]:
    """The page of presets, each with the keys that it fills in."""
    parts = [
        section(name, f"{prose(preset)}\n\n```yaml\n{write_yaml(preset()).strip()}\n```")
        for name, preset in PRESETS.items()
    ]
    links = bullets(f"[{code(name)}](#{name})" for name in PRESETS)
    about = (
        "`preset: NAME` in a recipe fills in a published method; keys of your own win, and a run "
        "prints what it expands to."
    )
    yield "reference/presets.md", page("Presets", about, links, *parts)


def _factors() -> str:
    kinds = get_args(Schedule.model_fields["kind"].annotation)
    rows = [
        (code(kind), *(f"{factor(_example(kind), share):.3g}" for share in SHARES))
        for kind in kinds
    ]
    heads = ("kind", *(f"{share:.0%} of the steps" for share in SHARES))
    return f"With `first: 1`, `last: 0` and, of `step`, `begin: 0.5`:\n\n{table(heads, rows)}"


def _example(kind: str) -> Schedule:
    return Schedule.model_validate({"kind": kind, **({"begin": 0.5} if kind == "step" else {})})
