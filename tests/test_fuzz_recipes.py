"""Any recipe or study is read, or refused in one line: never a traceback, never another meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_recipes import BASES, Tree, cases, refused, wrong_texts, wrong_trees
from hypothesis import given
from hypothesis import strategies as st

from fastkd.data.batching import plan_batches
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.recipe import (
    AnyRecipe,
    Recipe,
    dump_recipe,
    load_any_recipe,
    parse_any_recipe,
    resolve_steps,
    stage_recipes,
)
from fastkd.recipe.yaml_text import read_yaml
from fastkd.study import StudySpec, load_study
from fastkd.study.plan import Plan
from fastkd.study.spec import parse_study
from fastkd.training.deepspeed_config import deepspeed_of_student

RECIPES = ("text", "labelled", "staged", "tuned")
STUDIES = ("study", "search")


def use(recipe: AnyRecipe) -> None:
    """What is made of a recipe alone, before data or models are read."""
    assert parse_any_recipe(read_yaml(dump_recipe(recipe))) == recipe
    deepspeed_of_student(recipe, plan_batches(recipe, 1))
    try:
        resolve_steps(recipe.train, 1000)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not isinstance(recipe, Recipe):
        return
    for stage in stage_recipes(recipe):
        deepspeed_of_student(stage, plan_batches(stage, 1))
    make_layer_map(recipe.layer_map, min(recipe.student.layers, 64), 64, seed=recipe.train.seed)


def study_of(tree: Tree) -> Plan:
    return Plan(parse_study(tree), Path("study.yaml"))


@pytest.mark.parametrize("base", BASES)
def test_the_bases_are_valid(base: str, tmp_path: Path) -> None:
    tree, model = BASES[base]
    if model is StudySpec:
        study_of(tree)
    else:
        use(parse_any_recipe(tree))


@pytest.mark.parametrize("base", RECIPES)
def test_wrong_recipes_are_refused_in_one_line(base: str) -> None:
    @cases(120)
    @given(wrong_trees(base))
    def try_one(tree: Tree) -> None:
        refused(lambda: use(parse_any_recipe(tree)))

    try_one()


@pytest.mark.parametrize("base", RECIPES)
def test_wrong_texts_are_refused_in_one_line(base: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    @cases(60)
    @given(wrong_texts(base))
    def try_one(text: str) -> None:
        path.write_bytes(text.encode(errors="surrogatepass"))
        refused(lambda: use(load_any_recipe(path)))

    try_one()


@pytest.mark.parametrize("base", STUDIES)
def test_wrong_studies_are_refused_in_one_line(base: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"

    @cases(60)
    @given(wrong_texts(base) | wrong_trees(base))
    def try_one(given: str | Tree) -> None:
        if isinstance(given, str):
            path.write_bytes(given.encode(errors="surrogatepass"))
            refused(lambda: Plan(load_study(path), path))
        else:
            refused(lambda: Plan(parse_study(given), path))

    try_one()


OVERRIDES = st.one_of(
    st.text(max_size=20),
    st.builds(
        "{}={}".format,
        st.sampled_from(["train.steps", "losses", "losses.hidden.weight", "a", "", ".", "train"])
        | st.text("abc.=_[]", max_size=8),
        st.sampled_from(["1", "{}", "[", "&a [*a]", "!!int x", "1" * 5000, "\0"])
        | st.text(max_size=8),
    ),
)


def test_wrong_overrides_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(parse_any_recipe(BASES["text"][0])))

    @cases(100)
    @given(st.lists(OVERRIDES, max_size=3))
    def try_one(overrides: list[str]) -> None:
        refused(lambda: use(load_any_recipe(path, overrides)))

    try_one()
