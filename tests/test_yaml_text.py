"""A file says each thing once, by the rules of YAML 1.2, and bounds what a stranger's may hold."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_training import fastkd

from fastkd.errors import UserError
from fastkd.recipe import (
    Recipe,
    dump_recipe,
    load_any_recipe,
    load_recipe,
    parse_recipe,
    read_tree,
    write_yaml,
)
from fastkd.recipe.yaml_text import YamlError, quoted, read_yaml
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


INFINITE = float("inf")
CORE: dict[str, object] = {
    # what YAML 1.1 reads as 8, 90, 90.5, 1000, 3, a switch, a date, text
    **{"010": 10, "-017": -17, "08": 8, "1:30": "1:30", "1:30.5": "1:30.5", "1_000": "1_000"},
    **{"0b11": "0b11", "no": "no", "Yes": "Yes", "on": "on", "OFF": "OFF", "y": "y"},
    **{"2024-01-31": "2024-01-31", "2024-13-45": "2024-13-45", "1e3": 1000.0, "1E-2": 0.01},
    **{"0o17": 15, "=": "=", "2024-01-31 10:00:00": "2024-01-31 10:00:00"},
    # the same in both
    **{"0": 0, "+7": 7, "-3": -3, "0x1F": 31, "0.5": 0.5, ".5": 0.5, "1.": 1.0, "1.0e-3": 0.001},
    **{".inf": INFINITE, "-.INF": -INFINITE, "true": True, "FALSE": False, "~": None, "null": None},
    **{"''": "", "'010'": "010", '"true"': "true", "!!str 010": "010", "! x": "x"},
    **{"!!int 010": 10, "!!float 1": 1.0, "!!null ~": None, "9223372036854775807": 2**63 - 1},
    # near misses of the schema
    **{"0o8": "0o8", "tRUE": "tRUE", "1e": "1e", ".": ".", "--1": "--1", "0x": "0x", "nan": "nan"},
    "\u0661": "\u0661",
}


@pytest.mark.parametrize("text", CORE)
def test_scalars_are_those_of_the_core_schema(text: str) -> None:
    (found,) = read_yaml(f"- {text}")
    assert found == CORE[text] and type(found) is type(CORE[text])
    assert read_yaml(text) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1e999", "line 1: 1e999 is more than a number can hold"),
        ("a: 9223372036854775808", "line 1: 9223372036854775808... is a number of 19 digits"),
        ("b: 1\na: " + "7" * 5000, "line 2: 77777777777777777777... is a number of 5000 digits"),
        ("a: !!int x", "line 1: 'x' is not of the kind !!int that it is given"),
        ("a: !!bool maybe", "line 1: 'maybe' is not of the kind !!bool that it is given"),
        ("a: !!int {b: 1}", "line 1: a section or list can't be !!int"),
        ("a: !!python/name:os.system", "line 1: unknown tag !!python/name:os.system; leave it"),
        ("a: !!timestamp 2024-01-01", "line 1: unknown tag !!timestamp; leave it out"),
        ("a: !!binary aGk=", "line 1: unknown tag !!binary; leave it out"),
        ("a: !own b", "line 1: unknown tag '!own'; leave it out"),
        ('a: "\\ud800"', "line 1: half a surrogate pair is no text"),
        ('a: "\\U7fffffff"', "not YAML (chr() arg not in range"),
        ("1: a", "line 1: the key '1' is no text; put quotes around it"),
        ("true: a", "line 1: the key 'true' is no text"),
        ("? [a]\n: b", "line 1: the key a list is no text"),
        ("a: " + "[" * 100_000, "line 1: more than 50 sections inside each other"),
        ("".join(" " * n + "a:\n" for n in range(900)), "line 50: more than 50 sections"),
        ("a: &a\n  b: {c: *a}\n", "a.b.c holds itself, by an anchor"),
        ("a: 1\n---\nb: 2\n", "not YAML (expected a single document"),
        ("a: *b", "not YAML (found undefined alias"),
        ("<<: 3", "not YAML (while constructing a mapping"),
        ("a: \0", "not YAML (unacceptable character"),
        ("a: x" + "x" * (1 << 20), "more than 1,048,576 characters"),
    ],
    ids=lambda text: repr(text[:24]),
)
def test_what_is_no_plain_value_is_refused(text: str, expected: str) -> None:
    with pytest.raises(YamlError, match=f"^{re.escape(expected)}") as refused:
        read_yaml(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"], ids=["lists", "merge keys"])
def test_aliases_nine_levels_deep_are_refused_before_they_are_written_out(form: str) -> None:
    lines = ["deepspeed:", "  a0: &a0 {x: 1}"]
    for level in range(1, 10):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"  a{level}: &a{level} {form.format(inner)}")
    started = time.monotonic()
    with pytest.raises(
        YamlError, match=r"^line .: its aliases stand for more than 100,000 values$"
    ):
        read_yaml("\n".join(lines))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("form", ["[{}]", "{{<<: {}}}", "{{a: {}}}"])
def test_aliases_inside_each_other_are_as_deep_as_they_are_written_out(form: str) -> None:
    def chain(levels: int) -> str:
        lines = [f"a{n}: &a{n} {form.format(f'*a{n - 1}')}" for n in range(1, levels)]
        return "\n".join(["a0: &a0 {x: 1}", *lines])

    # the mapping around, one a level, and what the first one holds
    assert len(read_yaml(chain(48))) == 48
    with pytest.raises(
        YamlError, match=r"^line 1: its aliases stand for more than 50 sections ins"
    ):
        read_yaml(chain(49))


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"not YAML|more than"):
        load_recipe("/dev/zero")
    with pytest.raises(UserError, match=r"^a\\x00b: not a readable recipe \(embedded null byte\)"):
        load_recipe("a\0b")


@pytest.mark.parametrize("form", ["[{}]", "{{a: [{}]}}"])
def test_a_file_of_many_values_is_not_said_to_have_aliases(form: str) -> None:
    with pytest.raises(YamlError, match=r"^line 1: more than 100,000 values$"):
        read_yaml(form.format("1," * 100_000))


def test_other_scripts_take_a_recipe_no_more_room_than_the_user_wrote() -> None:
    words = [f"{'жук' * 8} {number}" for number in range(300)]
    written = write_yaml({"labels": words})
    assert len(written) < 1.2 * len(", ".join(words)) and read_yaml(written) == {"labels": words}


def test_what_a_terminal_obeys_is_escaped() -> None:
    # of its own, of lines, of the direction of writing, of no width
    obeyed = "\x07\x1b\x7f\x85\x9b\u2028\u2029\u202e\u200b\ufeff\U000e0001\n\r\t"
    for written in (write_yaml({"a": f"é{obeyed}\U0001f600"}), quoted(f"é{obeyed}\U0001f600")):
        assert not set(obeyed) & set(written.rstrip("\n"))
        assert "é" in written and "\U0001f600" in written


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (["x" * 2**20], "1,048,579 characters, expected at most 1,048,576"),
        ({"a": [1] * 99_999}, "100,001 values, expected at most 100,000"),
    ],
    ids=["characters", "values"],
)
def test_nothing_is_written_that_can_not_be_read(tree: object, expected: str) -> None:
    with pytest.raises(YamlError, match=f"^{expected}$"):
        write_yaml(tree)


def test_as_much_as_can_be_written_is_read() -> None:
    tree = {"a": [1] * 99_998}
    assert read_yaml(write_yaml(tree)) == tree


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from([*CORE, "a: b", "# x", "- x", " x ", "a\n b\n\nc \n", "<<", "*a", "!x", "%"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("aé:#1 <"), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(PLAIN)
def test_what_is_written_reads_back_as_it_was(tree: object) -> None:
    text = write_yaml(tree)
    assert read_yaml(text) == tree
    # and so it does elsewhere
    assert yaml.safe_load(text) == tree


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
@example("donn\u00e9es\U0001f600.txt")
@example("\u2028\x85\x7f\ufeff \x00")
def test_text_in_quotes_reads_back_as_it_was_on_one_line(text: str) -> None:
    written = quoted(text)
    assert len(written.splitlines()) == 1
    assert read_yaml(f"a: [{written}, {written}]  # {len(text)}") == {"a": [text, text]}


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
        (
            ["train.steps=1e999"],
            "'train.steps=1e999': line 1: 1e999 is more than a number can hold",
        ),
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


@pytest.mark.parametrize(("labels", "given"), [("[true, false]", "True"), ("[0, 1]", "0")])
def test_words_that_yaml_reads_otherwise_must_be_quoted(labels: str, given: str) -> None:
    task = f"task: {{name: t, source: s, columns: {{texts: a, label: b}}, labels: {labels}}}"
    tree = read_yaml(RECIPE.replace("data: {train: text.txt}", task))
    with pytest.raises(UserError, match=r"labels\.0: .*; put quotes around a word .*given") as no:
        parse_recipe(tree)
    assert given in str(no.value)
    tree = read_yaml(RECIPE.replace("data: {train: text.txt}", "data: {train: true}"))
    with pytest.raises(UserError, match=r"data\.train: expected a value, not a switch .*; put quo"):
        parse_recipe(tree)


@pytest.mark.parametrize("words", ["no, yes", "on, off", "2024-01-01, 2024-13-45", "1:30, 0b1"])
def test_words_of_yaml_1_2_are_labels(words: str) -> None:
    task = f"task: {{name: t, source: s, columns: {{texts: a, label: b}}, labels: [{words}]}}"
    recipe = parse_recipe(read_yaml(RECIPE.replace("data: {train: text.txt}", task)))
    assert recipe.task is not None and recipe.task.labels == tuple(words.split(", "))
    assert load_again(recipe) == recipe


def load_again(recipe: Recipe) -> Recipe:
    return parse_recipe(read_yaml(dump_recipe(recipe)))
