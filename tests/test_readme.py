"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from fastkd.layer_map import make_layer_map
from fastkd.recipe import parse_recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def _block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)[0]


def test_recipe_is_valid() -> None:
    recipe = parse_recipe(yaml.safe_load(_block("yaml")))
    assert recipe.losses.terms["hidden"].weight == 10


def test_python_example_gives_gradients() -> None:
    names: dict[str, object] = {}
    exec(compile(_block("python"), "README.md", "exec"), names)
    student = names["student"]
    gradient = student.encoder.layer[2].attention.self.query.weight.grad  # type: ignore[attr-defined]
    assert gradient.abs().max() > 0
    assert student.encoder.layer[2].output.dense.weight.grad is None  # type: ignore[attr-defined]


def test_layer_maps_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| `(\w+|\[.*?\])` \|.*\| ([\d, -]+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 5
    for kind, expected in rows:
        targets = make_layer_map(yaml.safe_load(kind), 3, 6).rows()
        assert [t for _, t in targets] == [
            None if t == "-" else int(t) for t in expected.split(", ")
        ]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
