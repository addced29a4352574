"""A file says each thing once, and numbers mean what everyone reads in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tiny_training import fastkd

from fastkd.errors import UserError
from fastkd.recipe import load_any_recipe, load_recipe, parse_recipe, read_tree
from fastkd.recipe.yaml_text import YamlError, read_yaml
from fastkd.study.spec import load_study

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
RECIPE = """\
teacher: {model: some/teacher}
student: {layers: 2}
losses: {hidden: {}}
data: {train: text.txt}
run: {output: runs/one}
train:
  steps: 3
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {a: 1}\nother: 2\ntrain: {b: 1}\n", "train is given twice, in lines 1 and 3"),
        ("train: {a: 1}\ntrain: {a: 1}\n", "train is given twice, in lines 1 and 2"),
        ("a:\n  b:\n    c: 1\n    c: 2\n", "a.b.c is given twice, in lines 3 and 4"),
        ("a: {b: 1, 'b': 2}", "a.b is given twice, in line 1"),
        ("a:\n- b: 1\n- c: 1\n  c: 2\n", "a.1.c is given twice, in lines 3 and 4"),
        ("x: &x {a: 1, a: 2}\ny: *x\n", "x.a is given twice, in line 1"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x\n", "y.<< is given twice, in lines 3 and 4"),
        ("1: a\n0x1: b\n", "0x1 is given twice, in lines 1 and 2"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(text: str, expected: str) -> None:
    with pytest.raises(YamlError, match=f"^{re.escape(expected)}; give it once$"):
        read_yaml(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n", {"a": 1, "b": 3}),
        ("x: &x {a: 1}\nz: &z {b: 2, a: 5}\ny: {<<: [*x, *z]}\n", {"a": 1, "b": 2}),
        ("x: &x {a: 1}\nz: &z {<<: *x, b: 2}\ny: {<<: *z, a: 3}\n", {"a": 3, "b": 2}),
        ("x: &x [1, 2]\ny: *x\n", [1, 2]),
        ("y: {a: {c: 1}, b: {c: 2}}", {"a": {"c": 1}, "b": {"c": 2}}),
    ],
)
def test_merge_keys_and_anchors_work_as_ever(text: str, expected: object) -> None:
    assert read_yaml(text)["y"] == expected == yaml.safe_load(text)["y"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_files_read_as_before(path: Path) -> None:
    assert read_tree(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_kind_of_file_is_read_so(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(RECIPE + "train:\n  steps: 4\n", encoding="utf-8")
    for load in (load_recipe, load_any_recipe, load_study):
        with pytest.raises(UserError) as refused:
            load(path)
        expected = f"{path}: train is given twice, in lines 6 and 8; give it once"
        assert str(refused.value) == expected


def test_the_command_ends_with_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + "train: {steps: 4}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert fastkd("distill", "recipe.yaml", monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert said == "fastkd: recipe.yaml: train is given twice, in lines 6 and 8; give it once\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 010", "line 1: 010 would be read as 8;"),
        ("a: 1\nb: -017", "line 2: -017 would be read as -15;"),
        ("a: 1:30", "line 1: 1:30 would be read as 90;"),
        ("a: 1:30.5", "line 1: 1:30.5 would be read as 90.5;"),
        ("a: 2024-13-45", r"not YAML \(month must be in"),
        ("a: " + "[" * 5000, r"not YAML \(maximum recursion"),
        ("a: &a\n  b: {c: *a}\n", r"a\.b\.c holds itself, by an anchor"),
        ("a: 1\n---\nb: 2\n", r"not YAML \(expected a single document"),
    ],
)
def test_what_reads_otherwise_than_it_looks_is_refused(text: str, expected: str) -> None:
    with pytest.raises(YamlError, match=f"^{expected}") as refused:
        read_yaml(text)
    assert "\n" not in str(refused.value)


def test_other_numbers_are_those_of_yaml() -> None:
    text = "[0, 7, -3, 0x10, 0b11, 1_000, 0.5, 00.5, 1.0e-3, .inf, '010', '1:30', 08]"
    found = read_yaml(text)
    assert found == [0, 7, -3, 16, 3, 1000, 0.5, 0.5, 0.001, float("inf"), "010", "1:30", "08"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.steps=1", "train.steps=2"],
            "train.steps=2 would undo train.steps=1, which is given too; give one of them",
        ),
        (
            ["train.steps=1", "train={seed: 2}"],
            "train={seed: 2} would undo train.steps=1, which is given too",
        ),
        (["train={seed: 1, seed: 2}"], "'train={seed: 1, seed: 2}': seed is given twice, in line"),
        (["train.steps=010"], "'train.steps=010': line 1: 010 would be read as 8; write"),
    ],
)
def test_overrides_that_undo_each_other_are_refused(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    with pytest.raises(UserError, match=f"^override {re.escape(expected)}"):
        load_recipe(path, overrides)


def test_overrides_that_agree_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe(path, ["train.steps=5", "train.steps=5", "train.seed=3"])
    assert (recipe.train.steps, recipe.train.seed) == (5, 3)
    recipe = load_recipe(path, ["train={steps: 5}", "train.seed=3"])
    assert (recipe.train.steps, recipe.train.seed) == (5, 3)


@pytest.mark.parametrize(
    ("labels", "given"),
    [("[no, yes]", "False"), ("[0, 1]", "0"), ("[on, off]", "True"), ("[2024-01-01, b]", "date")],
)
def test_words_that_yaml_reads_otherwise_must_be_quoted(labels: str, given: str) -> None:
    task = f"task: {{name: t, source: s, columns: {{texts: a, label: b}}, labels: {labels}}}"
    tree = read_yaml(RECIPE.replace("data: {train: text.txt}", task))
    with pytest.raises(UserError, match=r"labels\.0: .*; put quotes around a word .*given") as no:
        parse_recipe(tree)
    assert given in str(no.value)
    tree = read_yaml(RECIPE.replace("data: {train: text.txt}", "data: {train: no}"))
    with pytest.raises(UserError, match=r"data\.train: expected a value, not a switch .*; put quo"):
        parse_recipe(tree)
