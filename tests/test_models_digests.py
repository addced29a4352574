"""A run is continued with the models that it was started with, and with no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sentence_transformers import models
from tiny_exports import save_sentences
from tiny_models import save_teacher
from tiny_runs import keys, make_recipe, run_command, run_variants
from tiny_training import save_encoder, write_recipe, write_task

from fastkd.errors import UserError
from fastkd.models import model_digests, note_models
from fastkd.recipe import load_any_recipe, load_recipe
from fastkd.types import ModelSource

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _add(path: Path) -> None:
    (path.parent / "added_tokens.json").write_text("{}")


CHANGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights": (WEIGHTS, _flip, "has changed"),
    "configuration": (CONFIG, lambda path: path.write_text(path.read_text() + " "), "has changed"),
    "tokenizer": (TOKENIZER, Path.unlink, "is gone"),
    "another file": (CONFIG, _add, "was added"),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "start", "bert", seed=1)
    same = {"hidden_size": None, "intermediate_size": None}
    return make_recipe(tmp_path, student={"layers": 4, "init": str(tmp_path / "start"), **same})


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("field", ["teacher.model", "student.init"])
def test_a_model_that_was_replaced_is_refused(recipe: Path, change: str, field: str) -> None:
    loaded, run = load_recipe(recipe), recipe.parent / "run"
    run.mkdir()
    note_models(run, loaded)
    note_models(run, loaded)
    folder = recipe.parent / ("teacher" if field == "teacher.model" else "start")
    name, act, said = CHANGES[change]
    (folder / "README.md").write_text("read by nobody")
    note_models(run, loaded)
    act(folder / name)
    name = "added_tokens.json" if change == "another file" else name
    with pytest.raises(UserError, match=rf"^{field} {folder}: {name} {said} since {run} was"):
        note_models(run, loaded)


@pytest.mark.parametrize("text", ["", "[", "[]", '{"teacher.model": 3}'])
def test_a_damaged_note_is_one_line(recipe: Path, text: str) -> None:
    (recipe.parent / "models.json").write_text(text)
    with pytest.raises(UserError, match="can't be read"):
        note_models(recipe.parent, load_recipe(recipe))


def test_modules_inside_the_folder_count(tmp_path: Path) -> None:
    folder = save_sentences(tmp_path, models.Pooling(32))
    found = model_digests(ModelSource(str(folder)))
    assert {"modules.json", "config.json", "1_Pooling/config.json"} <= found.keys()
    entries = json.loads((folder / "modules.json").read_text())
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    entries[1]["path"] = "../outside"
    (folder / "modules.json").write_text(json.dumps(entries))
    assert not any("outside" in name for name in model_digests(ModelSource(str(folder))))


def test_resuming_refuses_another_teacher(recipe: Path) -> None:
    run = recipe.parent / "run"
    run_variants(recipe, [keys({"train.steps": 3})])
    assert set(json.loads((run / "models.json").read_text())) == {"teacher.model", "student.init"}
    (run / "summary.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    save_teacher(recipe.parent / "teacher", "bert", seed=2)
    done = run_command("distill", str(recipe), "train.steps=3", "--resume")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert f"teacher.model {recipe.parent}/teacher: model.safetensors has changed since" in last
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_model_that_is_tuned_counts(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    encoder = save_encoder(tmp_path / "encoder")
    recipe = load_any_recipe(write_recipe(tmp_path, "tuned"))
    note_models(tmp_path, recipe)
    _flip(encoder / WEIGHTS)
    with pytest.raises(UserError, match=r"^model.name .*encoder: model.safetensors has changed"):
        note_models(tmp_path, recipe)
