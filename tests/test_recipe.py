"""A recipe is read whole or refused in one line that names the field."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from fastkd.errors import UserError
from fastkd.recipe import (
    Recipe,
    Train,
    dump_recipe,
    load_any_recipe,
    load_recipe,
    parse_recipe,
)
from fastkd.recipe.train import resolve_steps

RECIPES = (Path(__file__).parents[1] / "recipes").glob("*.yaml")
SHIPPED = sorted(path for path in RECIPES if not path.name.startswith("study-"))
SMALLEST: dict[str, Any] = {
    "teacher": {"model": "some/teacher"},
    "student": {"layers": 2},
    "losses": {"hidden": {}},
    "data": {"train": "text.txt"},
    "run": {"output": "runs/one"},
}


def tree(**changes: Any) -> dict[str, Any]:
    """The smallest recipe with sections merged in, or put in their place where not mappings."""
    whole = copy.deepcopy(SMALLEST)
    for name, value in changes.items():
        merge = isinstance(value, dict) and name in whole
        whole[name] = {**whole[name], **value} if merge else value
    return whole


def refusal(given: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        parse_recipe(given, "my.yaml")
    message = str(refused.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    return message.removeprefix("my.yaml: ")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALLEST), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"student": {"layrs": 3}}, "student.layrs: unknown key; did you mean 'layers'?"),
        ({"tran": {}}, "tran: unknown key; did you mean 'train'? expected one of preset, "),
        ({"train": {"zzz": 1}}, "train.zzz: unknown key; expected one of steps, epochs, "),
        (
            {"losses": {"attention": {"wieght": 2}}},
            "losses.attention.wieght: unknown key; did you mean 'weight'? expected one of weight",
        ),
        ({"train": {3: 1}}, "train.3: keys should be strings (given 3)"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(changes: dict[str, Any], expected: str) -> None:
    assert refusal(tree(**changes)).startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"steps": "many"}}, "train.steps: input should be a valid integer"),
        ({"train": {"steps": 1.5}}, "train.steps: input should be a valid integer"),
        ({"train": {"steps": None}}, "train.steps: input should be a valid integer"),
        ({"train": {"steps": True}}, "train.steps: expected a value, not a switch"),
        ({"train": {"zero_stage": True}}, "train.zero_stage: expected a value, not a switch"),
        ({"student": {"layers": 0}}, "student.layers: input should be greater than 0"),
        ({"student": {"dropout": 1.0}}, "student.dropout: input should be less than 1"),
        ({"train": {"zero_stage": 4}}, "train.zero_stage: input should be 0, 1, 2 or 3"),
        ({"train": {"precision": "fp16"}}, "train.precision: input should be 'auto', 'fp32' or"),
        ({"train": {"betas": [0.9, 1.0]}}, "train.betas.1: input should be less than 1"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate: input should be a fini"),
        ({"losses": {"hidden": {"weight": float("nan")}}}, "losses.hidden.weight: input should be"),
        ({"losses": {"hidden": {"weight": -1}}}, "losses.hidden.weight: input should be greater"),
        ({"losses": {"hidden": 3}}, "losses.hidden: expected a section with keys weight, schedule"),
        ({"teacher": "some/teacher"}, "teacher: expected a section with keys model, revision, "),
        ({"teacher": {"sha256": "abc"}}, "teacher.sha256: string should match pattern"),
        ({"data": {"train": []}}, "data.train: value should have at least 1 item"),
        ({"data": {"train": ["a", 3]}}, "data.train.1: input should be a valid string"),
        ({"data": {"block_size": 4}}, "data.block_size: input should be greater than or equal"),
        ({"run": {"output": ""}}, "run.output: string should have at least 1 character"),
        ({"deepspeed": [1]}, "deepspeed: input should be a valid dictionary"),
    ],
)
def test_wrong_values_are_refused_with_what_was_given(
    changes: dict[str, Any], expected: str
) -> None:
    message = refusal(tree(**changes))
    assert message.startswith(expected)
    assert "(given " in message


@pytest.mark.parametrize(
    "given", ["unifrm", 3, None, {"a": 1}, [1, "a"], [1, -2], [1.0, 2], ["1", "2"], [True, 2]]
)
def test_a_layer_map_that_is_none_says_what_one_is(given: object) -> None:
    assert refusal(tree(layer_map=given)) == (
        "layer_map: expected uniform, last, first, skip, below_last, final, mean_target, "
        "mean_loss, random, emd, attention or a list with one teacher layer for each student "
        "layer, 0 for none; random, emd, attention may be a section with that kind, and pairs a "
        "list of [student layer, teacher layer] "
        f"(given {given!r})"
    )


@pytest.mark.parametrize(
    ("given", "count"), [([1], 1), ([1, 2, 3], 3), ([], 0)], ids=["short", "long", "empty"]
)
def test_a_layer_map_names_one_layer_for_each_student_layer(given: list[int], count: int) -> None:
    assert refusal(tree(layer_map=given)).startswith(
        f"layer_map names {count} teacher layers, but student.layers is 2; give one for each"
    )


@pytest.mark.parametrize(
    ("section", "key"),
    [("teacher", "model"), ("student", "layers"), ("data", "train"), ("run", "output")],
)
def test_a_missing_key_is_named(section: str, key: str) -> None:
    given = tree()
    del given[section][key]
    assert refusal(given) == f"{section}.{key}: missing; it has no default, so give a value"
    del given[section]
    assert refusal(given).startswith(f"{section}: missing; ")


def test_further_complaints_are_counted() -> None:
    assert refusal(tree(student={"layers": 0, "heads": "x"})).endswith("(given 0) (and 1 more)")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"losses": {"hidden": None}},
            "losses: no term is given; expected attention, relations, hidden, emb",
        ),
        (
            {"losses": {"hidden": {"weight": 0}, "embedding": {"schedule": {"first": 0}}}},
            "losses: the weight of hidden and embedding is 0 throughout, so nothing is learned",
        ),
        (
            # a stage's losses stand in place of the recipe's
            {"stages": [{"losses": {"hidden": {}}}, {"losses": {"hidden": {"weight": 0}}}]},
            "stages.2: losses: the weight of hidden is 0 throughout, so nothing is learned",
        ),
        (
            {"train": {"precision": "bf16", "zero_stage": 0}},
            "train.precision is bf16 and train.zero_stage 0, .*; use zero_stage 1",
        ),
        (
            {"train": {"compile": True, "zero_stage": 3}},
            "train.compile is on and train.zero_stage 3, .*; use zero_stage 2, or leave",
        ),
        (
            {"train": {"compile": True}, "teacher": {"placement": "shard"}},
            "train.compile is on and teacher.placement shard, .*; use replicate, or leave",
        ),
        (
            {"teacher": {"cache_attention": "recomputed"}},
            "teacher: cache_attention is recomputed, but cache is none, .*; give cache=exact or",
        ),
        (
            {"train": {"steps": 10, "warmup_steps": 10}},
            r"train.warmup_steps is 10, expected fewer than train.steps \(10\)",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_named(
    changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=rf"^my\.yaml: {expected}"):
        parse_recipe(tree(**changes), "my.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"student: [1", "not YAML"),
        (b"a: b: c", "not YAML"),
        (b"!!python/object:os.system {}", "line 1: unknown tag !!python/object:os.system"),
        (b"- one\n- two", "expected a mapping of sections, found list"),
        (b"", "expected a mapping of sections, found NoneType"),
        (b"\xff\xfe\x00", "not a readable recipe"),
    ],
)
def test_files_that_hold_no_recipe_are_refused(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_recipe(path)
    assert str(refused.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"not a readable recipe .* give a YAML file"):
        load_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("override", "section", "field", "expected"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("data.train=[a.txt, b.txt]", "data", "train", ("a.txt", "b.txt")),
        ("data.train=a.txt", "data", "train", ("a.txt",)),
        ("student.dropout=null", "student", "dropout", None),
        ("run.output=runs/a=b", "run", "output", "runs/a=b"),
        ("run.output='runs/a #2'", "run", "output", "runs/a #2"),
        ("run.output=runs/a#2", "run", "output", "runs/a#2"),
        ("train=steps: 7\n# of which\nwarmup_steps: 1\n", "train", "warmup_steps", 1),
        ("teacher.revision='1'", "teacher", "revision", "1"),
    ],
)
def test_an_override_is_a_dotted_key_and_a_yaml_value(
    file: Path, override: str, section: str, field: str, expected: object
) -> None:
    assert getattr(getattr(load_recipe(file, [override]), section), field) == expected


def test_overrides_reach_nested_and_absent_sections(file: Path) -> None:
    overrides = [
        "losses.attention.weight=3",
        "layer_map=[2,0]",
        "deepspeed.zero_optimization.overlap_comm=true",
    ]
    recipe = load_recipe(file, overrides)
    assert recipe.losses.terms["attention"].weight == 3
    assert recipe.layer_map == (2, 0)
    assert recipe.deepspeed == {"zero_optimization": {"overlap_comm": True}}


def test_an_override_fills_a_section_that_is_written_but_empty(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(train=None)), encoding="utf-8")
    assert load_recipe(path, ["train.steps=3"]).train.steps == 3


def test_an_override_can_switch_a_term_off(file: Path) -> None:
    recipe = load_recipe(file, ["losses.embedding={}", "losses.hidden=null"])
    assert list(recipe.losses.terms) == ["embedding"]


def test_a_name_that_the_file_system_can_not_hold_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_recipe(file, ["run.output=café"]).run.output == "café"
    # as with LC_ALL=C and PYTHONUTF8=0
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(UserError, match=r"run\.output: .* in ascii .*'café'; set PYTHONUTF8=1"):
        load_recipe(file, ["run.output=café"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.output=runs/a #2", "override 'run.output=runs/a #2': YAML takes what follows #"),
        ("run.output=#2", "override 'run.output=#2': YAML takes what follows #"),
        ("run.output='a #1' #2", r"YAML takes what follows # for a comment"),
        ("train.steps", "override 'train.steps': expected dotted.key=value"),
        ("=3", "override '=3': expected dotted.key=value"),
        ("teacher.model.name=x", "override 'teacher.model.name': teacher.model is not a section"),
        ("train.steps=[1", r"override 'train.steps=\[1': not YAML"),
        ("train.step=3", r"train.step: unknown key; did you mean 'steps'\?"),
        ("train.steps=x", "train.steps: input should be a valid integer"),
    ],
)
def test_a_bad_override_is_refused(file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as refused:
        load_recipe(file, [override])
    assert "\n" not in str(refused.value)


def test_a_recipe_does_not_change() -> None:
    recipe = parse_recipe(tree())
    with pytest.raises(ValidationError, match="frozen"):
        recipe.layer_map = "last"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_map": [3, 0], "losses": {"attention": {"weight": 0.5}}},
        {"data": {"train": ["a", "b"], "heldout": "c"}, "train": {"betas": [0.8, 0.95]}},
        {"student": {"dropout": None}, "deepspeed": {"zero_optimization": {"overlap_comm": True}}},
    ],
)
def test_what_is_dumped_reads_back_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = parse_recipe(tree(**changes))
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(Recipe.model_fields)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_any_recipe(path).run.output.startswith("runs/")


def test_recipes_are_shipped() -> None:
    assert SHIPPED


def sections(model: type[BaseModel] = Recipe) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for kind in getattr(field.annotation, "__args__", (field.annotation,)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


@pytest.mark.parametrize(
    ("section", "field"),
    [(section, field) for section in sections() for field in section.model_fields],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_field_is_described_in_a_sentence(section: type[BaseModel], field: str) -> None:
    description = section.model_fields[field].description
    assert description
    assert description[0].isupper() or not description[0].isalpha()
    assert description.endswith(".")


@pytest.mark.parametrize(
    ("share", "steps", "expected"), [(0.29, 100, 29), (0.58, 100, 58), (0.1, 205, 20)]
)
def test_a_share_of_the_steps_is_that_of_its_digits(
    share: float, steps: int, expected: int
) -> None:
    train = resolve_steps(Train(warmup_share=share, steps=steps), None)
    assert train.warmup_steps == expected
