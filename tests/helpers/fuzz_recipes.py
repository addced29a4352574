"""Recipes and studies gone wrong: a valid one with some of its values replaced, added or left out.

FASTKD_FUZZ in the environment is how many times the usual number of cases are tried.
"""

from __future__ import annotations

import copy
import os
import types
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from study_files import MAPPINGS, TASKS, TUNING, WEIGHTS

from fastkd.errors import UserError
from fastkd.recipe import FinetuneRecipe, Recipe
from fastkd.study import StudySpec

Tree = dict[str, Any]
Path = tuple[str | int, ...]


def cases(usual: int) -> settings:
    """So many examples, the same ones every time, or a multiple of them."""
    factor = int(os.environ.get("FASTKD_FUZZ", "1"))
    return settings(
        max_examples=usual * factor,
        deadline=None,
        derandomize=factor == 1,
        suppress_health_check=list(HealthCheck),
    )


def refused(call: Callable[[], Any]) -> bool:
    """Whether a call was refused, which must take one short line."""
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        assert len(str(error)) < 2500, len(str(error))
        return True
    return False


TASK = {"name": "own", "source": "folder", "columns": {"texts": "a", "label": "b"}}
TEXT: Tree = {
    "teacher": {"model": "some/teacher"},
    "student": {"layers": 2, "head": "masked_lm"},
    "losses": {
        **{name: {} for name in ("attention", "relations", "hidden", "embedding")},
        "logits": {"kind": "js"},
        "mlm": {"schedule": {"kind": "linear"}},
    },
    "data": {"train": "text.txt"},
    "train": {"steps": 3, "micro_batch_size": 8},
    "run": {"output": "runs/one"},
    "deepspeed": {"wall_clock_breakdown": True},
}
LABELLED: Tree = {
    **{key: TEXT[key] for key in ("teacher", "run")},
    "student": {"layers": 2},
    "losses": {"labels": {}, "logits": {}, "balance": {"kind": "ratio"}},
    "layer_map": {"kind": "emd"},
    "task": {**TASK, "labels": ["no", "yes"], "augmentation": {}},
    "train": {"epochs": 1.5, "warmup_share": 0.1},
}
STAGED: Tree = {
    **{key: TEXT[key] for key in ("teacher", "student", "data", "run")},
    "preset": "tinybert",
    "stages": [{"losses": {"hidden": {}}}, {"train": {"steps": 2}, "layer_map": "last"}],
}
TUNED: Tree = {"model": {"name": "m"}, "task": {**TASK, "bounds": [0, 5]}, "run": TEXT["run"]}
STUDY: Tree = {
    "name": "tried",
    "output": "out",
    "recipe": {**LABELLED, "layer_map": "last", "losses": {"hidden": {"weight": 1}}},
    "axes": {"mapping": MAPPINGS},
    "spaces": {"weight": {**WEIGHTS, "points": 3}},
    "tasks": TASKS,
    "controls": {"alone": {"losses.hidden.weight": 0.5}},
    "seeds": 2,
    "metric": {"path": "after.score", "direction": "maximize", "heldout": "score"},
    "shared": {"teacher": {"command": "finetune", "recipe": TUNING, "per_task": True}},
    "skip": [{"mapping": "last", "weight": 100}],
}
SEARCH: Tree = {
    **{key: value for key, value in STUDY.items() if key != "skip"},
    "spaces": {"weight": WEIGHTS},
    "overrides": {"task.selection": {"share": 0.5}},
    "search": {"trials": 3, "pruner": "median"},
}
BASES: dict[str, tuple[Tree, type[BaseModel]]] = {
    "text": (TEXT, Recipe),
    "labelled": (LABELLED, Recipe),
    "staged": (STAGED, Recipe),
    "tuned": (TUNED, FinetuneRecipe),
    "study": (STUDY, StudySpec),
    "search": (SEARCH, StudySpec),
}

NUMBERS = (0, -1, 1, 7, 2**31, 2**63 - 1, -(2**63) + 1, 10**400, 10**5000, True, False)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e18, 1e200, 1e308, 1e-320, -1.5, float("nan"), float("inf"))
WORDS = (
    *("", " ", "a", "a\0b", "x" * 300, "a/" * 3000, "~nobody/x", "..", "/", "/proc/self/mem", "é"),
    *(
        "\u202e",
        "\x1b[2J",
        "[/x]",
        "\n",
        "kk",
        "emd",
        "random",
        "null",
        "true",
        "010",
        "1e5",
        "nan",
    ),
    *("package:os/x", "package:", "{shared.teacher}", "{shared.x}", "{}", "%s", "\ud800", "1_0"),
    *("flex_attention", "uniform", "**", "*", "[", "a=b,c", "$x$", "2024-13-45", "constant"),
)
SECTIONS = (
    {"kind": ["x"]},
    {"kind": {}},
    {"kind": "emd", "temperature": 1e-320},
    {"kind": "attention", "temperature": 1e200},
    {"kind": "random", "seed": 2**62},
    {"kind": "emd", "kinds": 1},
    ["kk", "kk"],
    [1, "1", 1.0, True],
    [[1], {"a": []}],
    [0, 0],
    [1, 2],
    {"": ""},
    {"a.b": 1},
    {"low": 0, "high": 1},
    {"values": ["a", "a/seed-0"]},
    {"type": "Adam"},
    {"enabled": True},
    {"enabled": "maybe", "stage": "x"},
)
# deeper than anything has a use for
DEEP: Any = "x"
for _ in range(60):
    DEEP = {"a": [DEEP]}

LEAVES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(FLOATS),
    st.sampled_from(WORDS),
    st.none(),
    st.floats(),
    st.integers(),
    st.text(max_size=8),
)
VALUES = st.one_of(
    LEAVES,
    st.sampled_from([*SECTIONS, [], {}, DEEP]),
    st.lists(LEAVES, max_size=3),
    st.dictionaries(st.text(max_size=4), LEAVES, max_size=3),
)


def fields(model: type[BaseModel], prefix: Path = ()) -> Iterator[Path]:
    """The path of every field of a section and of the sections in it."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for inner in _sections(field.annotation):
            if len(prefix) < 4:
                yield from fields(inner, (*prefix, name))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
    elif get_origin(annotation) is not dict:
        for argument in get_args(annotation):
            yield from _sections(argument)


def paths(tree: Any, prefix: Path = ()) -> Iterator[Path]:
    """The path of everything that stands in a tree."""
    listed = list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in tree.items() if isinstance(tree, dict) else listed:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def replaced(tree: Any, path: Path, value: Any) -> Any:
    """A tree with a value at a path; what is in the way becomes sections."""
    if not path:
        return value
    key, *rest = path
    if isinstance(tree, list) and isinstance(key, int) and key < len(tree):
        return [replaced(v, tuple(rest), value) if n == key else v for n, v in enumerate(tree)]
    section = tree if isinstance(tree, dict) else {}
    return {**section, str(key): replaced(section.get(str(key)), tuple(rest), value)}


def without(tree: Any, path: Path) -> Any:
    """A tree without what stands at a path."""
    made = copy.deepcopy(tree)
    node = made
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return made


@st.composite
def wrong_trees(draw: st.DrawFn, base: str) -> Tree:
    """A valid tree with one to three changes."""
    tree, model = BASES[base]
    known = [*fields(model), *paths(tree)]
    for _ in range(draw(st.integers(1, 3))):
        here = list(paths(tree))
        if draw(st.integers(0, 9)) == 0 and here:
            tree = without(tree, draw(st.sampled_from(here)))
        else:
            path = draw(st.sampled_from(known))
            if draw(st.integers(0, 9)) == 0:
                path = (*path, draw(st.sampled_from(["x", "", "kind", "weight", "__class__"])))
            tree = replaced(tree, path, draw(VALUES))
    return tree


SNIPPETS = (
    *("&a [*a]", "&a {b: *a}", "!!python/object/apply:os.system [ls]", "!!int x", "!!bool 3"),
    *("!!set {a, b}", "!!timestamp x", "2024-13-45", "1:30", "010", "[" * 400, "{a: " * 400, "'"),
    *("<<: 1", "{<<: {a: 1}}", "? [a]", "*b", "!x y", "|", ">", "%", "@", "`", "\t", "\0", "\x85"),
    *("1" * 5000, "1e999", "- a\n- b", "a: b: c", "---", "...", "\ufeff", "{1: 2}", "~: ~", ": :"),
)


@st.composite
def wrong_texts(draw: st.DrawFn, base: str) -> str:
    """The text of a valid file, damaged."""
    text = yaml.safe_dump(BASES[base][0], sort_keys=False)
    for _ in range(draw(st.integers(1, 2))):
        lines = text.split("\n")
        number = draw(st.integers(0, len(lines) - 1))
        line = lines[number]
        kind = draw(st.sampled_from(["value", "key", "twice", "cut", "insert", "character"]))
        snippet = draw(st.sampled_from(SNIPPETS) | st.text(max_size=5))
        if kind == "value":
            lines[number] = f"{line.split(':')[0]}: {snippet}"
        elif kind == "key":
            lines[number] = f"{snippet}: 1"
        elif kind == "twice":
            lines.insert(number, line)
        elif kind == "cut":
            lines = lines[:number]
        elif kind == "insert":
            lines.insert(number, snippet)
        else:
            place = draw(st.integers(0, len(line)))
            lines[number] = line[:place] + draw(st.characters()) + line[place:]
        text = "\n".join(lines)
    return text
