"""The reference has a place for all that is registered, and for every key of what runs write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import fastkd_kernels
import pytest
import yaml
from entries import FILES
from maps import map_names
from messages import GAP, refusals, texts
from pages import ROOT, broken_links
from pydantic import ValidationError
from records import LINES, Summary, read_line
from reference import FOLDER, navigation, pages
from tiny_rows import row_recipe
from tiny_runs import make_recipe
from tiny_training import save_classifier, save_encoder, task_section, write_task

import fastkd
from fastkd.cli import app
from fastkd.layer_map.sections import MAP_SECTIONS, MapKind
from fastkd.losses.hidden import HiddenLoss
from fastkd.losses.registry import BUILT_IN
from fastkd.recipe.fields import fields_of
from fastkd.recipe.presets import PRESETS
from fastkd.recipe.weights import Balance, Schedule


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


def words(section: Any, field: str) -> tuple[str, ...]:
    return get_args(section.model_fields[field].annotation)


def test_every_kind_has_a_page_that_the_index_links_to(made: dict[str, str]) -> None:
    maps = {*get_args(MapKind), *MAP_SECTIONS, "list"}
    assert set(map_names()) == maps
    kinds = {
        "losses": BUILT_IN,
        "maps": maps,
        "weights": (*words(Balance, "kind"), "schedule"),
        "fields": ("distill", "finetune", "study"),
    }
    for place, names in kinds.items():
        index = made[f"{FOLDER}/{place}/index.md"]
        for name in names:
            assert f"({name}.md)" in index
            # a title, a paragraph and something in a table or a list
            assert len(made[f"{FOLDER}/{place}/{name}.md"]) > 200, name
    assert set(re.findall(r"^## (\S+)$", made[f"{FOLDER}/presets.md"], re.MULTILINE)) == {*PRESETS}
    schedule = made[f"{FOLDER}/weights/schedule.md"]
    assert all(f"| `{kind}` | " in schedule for kind in words(Schedule, "kind"))


@pytest.mark.parametrize("name", FILES)
def test_every_field_has_a_row(made: dict[str, str], name: str) -> None:
    page = made[f"{FOLDER}/fields/{name}.md"]
    entries = list(fields_of(FILES[name][0]))
    assert len(entries) > 20
    for entry in entries:
        assert f"\n| `{entry.key}` | " in page, entry.key
    assert page.count("\n| `") == len(entries)


def test_every_field_of_a_loss_is_on_its_page(made: dict[str, str]) -> None:
    from fastkd.losses.registry import loss_class

    for name in BUILT_IN:
        own = loss_class(name).Config.model_fields.keys() - fastkd.LossConfig.model_fields.keys()
        assert all(f"\n| `{field}` | " in made[f"{FOLDER}/losses/{name}.md"] for field in own)


def test_every_command_and_every_public_name_is_there(made: dict[str, str]) -> None:
    commands = made[f"{FOLDER}/commands.md"]
    names = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    assert len(names) == 11
    for name in names:
        assert f"\n## `fastkd {name}`\n" in commands and f"(#fastkd-{name})" in commands
    assert "`--resume`" in commands
    for package in (fastkd, fastkd_kernels):
        page = made[f"{FOLDER}/python/{package.__name__}.md"]
        for name in package.__all__:
            said = f"::: {package.__name__}.{name}\n"
            assert (said in page) != name.startswith("_")
            row = rf"\n\| \[`{name}`\]\([^)]+\) \| .{{10,}} \|\n"
            index = made[f"{FOLDER}/python/index.md"]
            assert name.startswith("_") or re.search(row, index), name


def test_every_page_stands_in_the_navigation(made: dict[str, str]) -> None:
    def paths(entries: Any) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        inner = entries.values() if isinstance(entries, dict) else entries
        return [path for one in inner for path in paths(one)]

    assert sorted(paths(navigation())) == sorted(made)


def test_pages_link_to_pages(made: dict[str, str]) -> None:
    for path, text in made.items():
        assert not broken_links(f"docs/{path}", text), path


def test_refusals_are_the_words_of_the_code(made: dict[str, str]) -> None:
    found = refusals([HiddenLoss.Config], {})
    assert found[0] == (
        "student_module and teacher_module are compared with each other; give both, or neither"
    )
    assert (
        f"losses.attention compares heads one by one, but the student has {GAP} and the teacher "
        f"{GAP}; set student.heads={GAP}, or leave the term out"
    ) in made[f"{FOLDER}/losses/attention.md"]
    # a name of something else keeps its gap
    relations = made[f"{FOLDER}/losses/relations.md"]
    assert f"`layer_map {GAP} mixes several teacher layers" in relations
    assert "register" not in relations


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines and summary of a run, each checked key by key."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        read_line(line)
    summary = json.loads((folder / "summary.json").read_text())
    Summary.model_validate(summary)
    return lines, summary


def test_what_a_run_of_text_writes_is_described(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    rows = [f"w{n} w7\tw{n} w8\t{n}" for n in range(5, 12)]
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    recipe = make_recipe(
        tmp_path,
        evaluate={"pairs": {"mine": str(pairs)}},
        train={"steps": 2, "warmup_steps": 0, "evaluate_every": 1, "profile": True},
        run={"output": str(tmp_path / "run"), "keep_best": "total"},
    )
    result = fastkd.distill(recipe, quiet=True)
    lines, summary = read_run(result.folder)
    assert {line["kind"] for line in lines} == {"train", "heldout", "teacher"}
    assert {"profile", "kept_best", "teacher", "corpus_tokens"} <= summary.keys()
    with pytest.raises(ValidationError, match="extra_forbidden"):
        read_line({**lines[0], "another": 1})


def test_a_recipe_with_stages_has_a_summary_of_each(tmp_path: Path) -> None:
    stages = [{"losses": {"hidden": {}}}, {"losses": {"embedding": {}}}]
    given = make_recipe(tmp_path, train={"steps": 1, "warmup_steps": 0}).read_text()
    recipe = {**yaml.safe_load(given), "stages": stages}
    result = fastkd.distill(recipe, {"run.lean": True}, quiet=True)
    summary = Summary.model_validate(result.summary)
    assert summary.stages is not None and len(summary.stages) == 2
    for stage in summary.stages:
        Summary.model_validate(stage)


def test_what_is_described_is_written_somewhere() -> None:
    said = texts(ROOT / "fastkd")
    keys = {entry.key for root in (*LINES.values(), Summary) for entry in fields_of(root)}
    parts = {part.removesuffix("_per_second") for key in keys for part in key.split(".")}
    assert len(parts) > 50 and not parts - said


def test_what_runs_of_rows_and_tasks_write_is_described(tmp_path: Path) -> None:
    rows = fastkd.distill(row_recipe(tmp_path / "rows", train={"steps": 2}), quiet=True)
    assert "data_rows" in read_run(rows.folder)[1]
    folder = tmp_path / "task"
    write_task(folder / "task")
    save_encoder(folder / "encoder")
    save_classifier(folder / "teacher")
    tree = {
        "teacher": {"model": str(folder / "teacher")},
        "student": {"layers": 2},
        "losses": {"logits": {}, "labels": {}},
        "task": task_section(folder),
        "train": {"steps": 2, "batch_size": 8, "log_every": 1},
        "run": {"output": str(folder / "run")},
    }
    lines, summary = read_run(fastkd.distill(tree, quiet=True).folder)
    assert "examples_per_second" in lines[-2] and "class_f1" in summary["after"]
    tuned = {"model": str(folder / "encoder"), **{k: tree[k] for k in ("task", "train")}}
    done = fastkd.finetune({**tuned, "run": {"output": str(folder / "tuned")}}, quiet=True)
    assert read_run(done.folder)[1]["layer_map"] is None
