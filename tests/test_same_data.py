"""Data and teachers that change under a run: what goes on, or is judged, with others is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_teacher, write_text
from tiny_rows import row_recipe
from tiny_runs import make_recipe
from tiny_training import save_classifier, write_recipe, write_task

import fastkd
from fastkd.errors import UserError
from fastkd.recipe import load_any_recipe
from fastkd.training.same_data import judged_by, require_same_data, shared_parts

HEADER = "sentence1\tsentence2\tscore"


def write_pairs(path: Path, sign: int = 1) -> Path:
    rows = [f"w{n} w{9 + n % 5}\tw{7 + n % 3} w30 w{n}\t{sign * (n * n % 7)}" for n in range(5, 18)]
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def refused(recipe: Path, overrides: dict[str, Any], **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        fastkd.distill(recipe, overrides, quiet=True, **given)
    said = str(caught.value)
    assert "\n" not in said
    return said


def swap(path: Path) -> None:
    """Give every example of a task the other class."""
    text = path.read_text().replace("\tno", "\t?").replace("\tyes", "\tno")
    path.write_text(text.replace("\t?", "\tyes"))


def test_a_set_that_decides_may_not_change_before_a_run_goes_on(tmp_path: Path) -> None:
    dev = write_task(tmp_path / "task") / "dev.tsv"
    save_classifier(tmp_path / "classifier")
    train = {"steps": 4, "evaluate_every": 1, "checkpoint_every": 1}
    recipe = write_recipe(tmp_path, "run", train=train, run={"keep_best": "score"})
    with pytest.raises(ZeroDivisionError):
        fastkd.distill(recipe, quiet=True, on_evaluate=lambda step, _: 1 // (3 - step))
    swap(dev)
    run = tmp_path / "run"
    assert f"data (dev): not what {run} read" in refused(recipe, {}, resume=True)
    swap(dev)
    # where it lies and how it is read may
    moved = {"task.cache": str(tmp_path / "moved"), "task.padding": "none"}
    assert fastkd.distill(recipe, moved, quiet=True, resume=True).summary["steps"] == 4


@pytest.mark.parametrize("change", ["score", "text"])
def test_pairs_may_not_change_before_a_run_goes_on_or_is_judged(
    tmp_path: Path, change: str
) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv")
    before = pairs.read_text()
    recipe = make_recipe(
        tmp_path,
        train={"steps": 3, "evaluate_every": 1, "checkpoint_every": 1},
        evaluate={"pairs": {"few": str(pairs)}},
        run={"keep_best": "few"},
    )
    with pytest.raises(ZeroDivisionError):
        fastkd.distill(recipe, quiet=True, on_evaluate=lambda step, _: 1 // (2 - step))
    if change == "score":
        write_pairs(pairs, -1)
    else:
        pairs.write_text(before.replace("w30", "w31"))
    assert "data (pairs few): not what" in refused(recipe, {}, resume=True)
    pairs.write_text(before)
    done = fastkd.distill(recipe, quiet=True, resume=True)
    write_pairs(pairs, -1)
    with pytest.raises(UserError, match=r"data \(pairs few\): .* as data\.train=FOLDER"):
        fastkd.evaluate(done, quiet=True)
    # pairs that are named are judged by
    found = fastkd.evaluate(done, {"evaluate.pairs.few.path": str(pairs)}, quiet=True)
    assert found.judged["pairs"]["few"] == pytest.approx(-done.summary["after"]["pairs"]["few"])


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two stages whose run was killed between them."""
    folder = tmp_path_factory.mktemp("staged")
    recipe = make_recipe(folder, train={"steps": 1, "warmup_steps": 0})
    stages = [{"train": {"steps": 1}}, {"train": {"steps": 2}}]
    fastkd.distill(recipe, {"stages": stages}, quiet=True)
    shutil.rmtree(folder / "run" / "stage-2")
    (folder / "run" / "summary.json").unlink()
    return folder


@pytest.mark.parametrize("change", ["teacher", "text"])
def test_a_later_stage_has_the_teacher_and_the_text_of_the_first(
    staged: Path, tmp_path: Path, change: str
) -> None:
    recipe, run = staged / "recipe.yaml", staged / "run"
    given = {"stages": [{"train": {"steps": 1}}, {"train": {"steps": 2}}]}
    place = staged / "teacher" if change == "teacher" else staged / "corpus.txt"
    kept = tmp_path / place.name
    shutil.move(place, kept)
    if change == "teacher":
        save_teacher(place, "bert", seed=2)
    else:
        write_text(place, documents=60, words=60, seed=3)
    said = refused(recipe, given, resume=True)
    if change == "teacher":
        assert f"teacher.model {place}: model.safetensors has changed since {run}/stage-1" in said
        shutil.rmtree(place)
    else:
        assert f"data (train): not what {run}/stage-1 read" in said
    shutil.move(kept, place)
    if change == "text":
        assert fastkd.distill(recipe, given, quiet=True, resume=True).summary["steps"] == 3


def test_a_run_is_judged_against_its_teacher_by_its_data(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, train={"steps": 1, "warmup_steps": 0})
    done = fastkd.distill(recipe, quiet=True)
    teacher, corpus = tmp_path / "teacher", tmp_path / "corpus.txt"
    text = corpus.read_text()
    corpus.write_text(text + "\n\nw9 w8 w7\n")
    with pytest.raises(UserError, match=r"data \(train\): not what .*run read: .* data\.train=F"):
        fastkd.evaluate(done, quiet=True)
    fastkd.evaluate(done, {"data.train": str(corpus)}, quiet=True)
    corpus.write_text(text)
    before = fastkd.evaluate(done, {"data.workers": 0, "teacher.attention": "sdpa"}, quiet=True)
    shutil.rmtree(teacher)
    save_teacher(teacher, "bert", seed=2)
    with pytest.raises(UserError, match=r"teacher\.model .*: model\.safetensors has changed since"):
        fastkd.evaluate(done, {"teacher.attention": "sdpa"}, quiet=True)
    after = fastkd.evaluate(done, {"teacher.model": str(teacher)}, quiet=True)
    assert after.total != pytest.approx(before.total, rel=1e-3)


def test_rows_are_judged_by_what_was_held_out(tmp_path: Path) -> None:
    recipe = row_recipe(tmp_path, train={"steps": 1})
    done = fastkd.distill(recipe, quiet=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[::2]))
    with pytest.raises(UserError, match=r"data \(heldout\): not what"):
        fastkd.evaluate(done, quiet=True)
    found = json.loads((done.folder / "summary.json").read_text())["data_digests"]
    assert found.keys() == {"train", "heldout"}


def test_parts_that_two_stages_read_alike(tmp_path: Path) -> None:
    base = load_any_recipe(write_recipe(tmp_path, "run"))
    parts = ["train", "dev", "selection"]

    def shared(**task: Any) -> list[str]:
        assert base.task is not None
        other = base.model_copy(update={"task": base.task.model_copy(update=task)})
        return shared_parts(base, other, parts)

    assert shared() == shared(padding="none", cache="elsewhere", evaluate=("dev",)) == parts
    assert shared(examples=3) == shared(train="more") == ["dev"]
    assert shared(max_length=16) == shared(source="other", examples=3) == []


def test_parts_that_an_evaluation_is_of() -> None:
    text = {"train": "1", "pairs few": "2"}
    assert judged_by(text) == text
    assert judged_by({**text, "heldout": "3"}) == {"pairs few": "2", "heldout": "3"}
    assert judged_by({"train": "1", "dev": "2"}) == {"dev": "2"}
    # the student's own tokenizer comes first, and is another file with every student
    require_same_data({"heldout": "1 2", "gone": "3"}, {"heldout": "4 2", "new": "5"}, "a", "b")
    with pytest.raises(UserError, match=r"^data \(heldout\): not what a read: .*; b$"):
        require_same_data({"heldout": "1 2"}, {"heldout": "1 4"}, "a", "b")
