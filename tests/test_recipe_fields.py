"""Fields of a recipe as `fastkd fields` lists them, and where a file should have what it says."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fastkd.cli import main
from fastkd.errors import UserError
from fastkd.recipe import FinetuneRecipe, Recipe, parse_finetune_recipe, parse_recipe
from fastkd.recipe.fields import WORDS, fields_of, place_of
from fastkd.study.spec import StudySpec

ROOTS: tuple[type[BaseModel], ...] = (Recipe, FinetuneRecipe, StudySpec)
TREE: dict[str, Any] = {
    "teacher": {"model": "m", "others": [{"model": "n"}]},
    "student": {"layers": 2},
    "layer_map": {"kind": "random", "redraw": "step"},
    "losses": {
        "attention": {"kind": "kl", "schedule": {"last": 0.5}},
        "hidden": {"layer_map": "last"},
        "embedding_output": {"dimensions": [8]},
        "balance": "ratio",
    },
    "data": {"train": "text.txt", "documents": "row"},
    "evaluate": {"pairs": {"mine": "pairs.tsv"}},
    "train": {"early_stopping": {"metric": "total", "patience": 2}, "evaluate_every": 5},
    "run": {"output": "runs/one"},
}


def leaves(tree: Any, key: str = "") -> Iterator[str]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key


def shape(key: str) -> str:
    """A key of a recipe as it is listed: losses share some fields, pairs and teachers are many."""
    key = re.sub(r"^losses\.\w+\.(weight|schedule|loss)\b", r"losses.*.\1", key)
    return key.replace("evaluate.pairs.mine", "evaluate.pairs.*")


@pytest.mark.parametrize("root", ROOTS)
def test_every_field_says_what_it_takes_and_does(root: type[BaseModel]) -> None:
    for entry in fields_of(root):
        assert entry.takes and "any value" not in entry.takes, entry
        assert entry.says and "\n" not in entry.says, entry


def test_what_a_recipe_holds_is_listed() -> None:
    keys = {entry.key for entry in fields_of(Recipe)}
    recipe = parse_recipe(TREE).model_dump(mode="json")
    found = {shape(key) for key in leaves(recipe)}
    # the kind of a mapping is what the mapping is, and several teachers are a list
    assert found - keys == {"layer_map.kind"}
    assert "teacher.others.*.model" in keys and "student.layers" in keys


def test_defaults_are_those_of_the_models() -> None:
    entries = {entry.key: entry for entry in fields_of(Recipe)}
    recipe = parse_recipe(TREE)
    assert entries["train.batch_size"].default == str(recipe.train.batch_size)
    assert entries["teacher.cache"].default == "none" and entries["run.output"].default is None
    assert entries["student.dropout"].takes == "a number, at least 0, below 1 or null"
    assert entries["train.zero_stage"].takes == "0, 1, 2, 3"
    assert entries["layer_map.redraw"].says.startswith("Of random: when")


def test_words_of_other_trainers_are_fields() -> None:
    keys = {entry.key for entry in fields_of(Recipe)}
    for word, key in WORDS.items():
        assert shape(key) in keys or key in keys, word
        assert place_of(word, Recipe) == f"it is called {key} here; "
    # a fine-tuning run has no teacher to say anything of
    assert place_of("teacher_model", FinetuneRecipe) == ""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 3}, "steps: unknown key; it is train.steps; expected one of preset, "),
        ({"lr": 3}, "lr: unknown key; it is called train.learning_rate here; expected"),
        ({"train": {"block_size": 8}}, "train.block_size: unknown key; it is data.block_size; "),
        ({"student": {"cache": "exact"}}, "it is teacher.cache or data.cache or task.cache; "),
        # what stands in many places is in none
        ({"student": {"weight": 1}}, "student.weight: unknown key; expected one of init, "),
    ],
)
def test_what_stands_elsewhere_is_told(changes: dict[str, Any], expected: str) -> None:
    tree = {**TREE, **changes, "student": {"layers": 2, **changes.get("student", {})}}
    with pytest.raises(UserError, match=re.escape(expected)):
        parse_recipe(tree)


def test_a_file_of_another_command_says_so() -> None:
    tuned = {"model": "m", "task": {"name": "MRPC", "source": "f"}, "run": {"output": "o"}}
    study = {"recipe": "r.yaml", "axes": {}, "name": "s"}
    for parse, own in ((parse_recipe, "distill"), (parse_finetune_recipe, "finetune")):
        for tree, other in ((TREE, "distill"), (tuned, "finetune"), (study, "study")):
            if other != own:
                said = f"this is a file of fastkd {other}, not of fastkd {own}"
                with pytest.raises(UserError, match=said):
                    parse(tree)
    assert parse_finetune_recipe(tuned).model.name == "m"


def listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fastkd", "fields", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


def test_the_command_lists_fields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = listed(monkeypatch, capsys, "losses.hidden")
    assert code == 0 and said.startswith("losses.hidden: a section or null; default null\n")
    assert "\nlosses.hidden.kind: mse, normalized_mse, cosine; default mse\n" in said
    assert "losses.attention" not in said
    for word in ("steps", "max_steps"):
        assert listed(monkeypatch, capsys, word)[1].startswith("train.steps: a whole number")
    assert "chosen.*.axis: text; required" in listed(monkeypatch, capsys, "--of", "study")[1]
    code, said = listed(monkeypatch, capsys, "train.stepz")
    assert code == 2 and said.count("\n") == 1 and "did you mean 'train.steps'?" in said


def test_completion_is_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("_FASTKD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fastkd fi")
    monkeypatch.setenv("COMP_CWORD", "1")
    monkeypatch.setattr(sys, "argv", ["fastkd"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.split() == ["finetune", "fields"]
