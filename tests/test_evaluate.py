"""What a run made is scored later, from anywhere and on other data; so is a fine-tuned model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_models import write_text
from tiny_runs import make_recipe, run_command
from tiny_training import (
    fastkd,
    run_whole,
    save_encoder,
    summary_of,
    write_recipe,
    write_task,
)

from fastkd.distributed import start_ranks, stop_ranks
from fastkd.errors import UserError
from fastkd.recipe import load_any_recipe
from fastkd.training.evaluate import Evaluation, Kept
from fastkd.training.evaluate_run import check_overrides, evaluate_run
from fastkd.training.run_folder import RunFolder

EPOCHS = {"steps": None, "epochs": 0.5}


def evaluated(run: Path, *overrides: str) -> Evaluation:
    """In this process."""
    ranks = start_ranks()
    try:
        return evaluate_run(RunFolder(run), overrides, ranks)
    finally:
        stop_ranks()


def write_test_split(folder: Path) -> None:
    """The second half of the training examples' file, under another name."""
    header, *rows = (folder / "train.tsv").read_text().splitlines()
    (folder / "test.tsv").write_text("\n".join([header, *rows[:30]]) + "\n")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fine-tuned run and one that distils it, all in relative paths."""
    folder = tmp_path_factory.mktemp("there")
    write_task(folder / "task")
    write_test_split(folder / "task")
    save_encoder(folder / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        relative = {"source": "task", "cache": "cache"}
        tuned = write_recipe(folder, "tuned", model="encoder", task=relative, train=EPOCHS)
        run_whole("finetune", tuned, "run.output=tuned")
        student = write_recipe(
            folder,
            "student",
            teacher={"model": "tuned/student"},
            task=relative,
            train=EPOCHS,
            losses={"hidden": {"schedule": {"kind": "cosine", "last": 0}}, "labels": {}},
        )
        run_whole("distill", student, "run.output=student")
    return folder


@pytest.mark.parametrize("name", ["tuned", "student"])
def test_a_run_of_epochs_and_relative_paths_is_evaluated_from_elsewhere(
    name: str, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = evaluated(there / name).as_dict()
    after = summary_of(there / name)["after"]
    assert found["scores"] == after["scores"] and found["examples"] == 40
    assert found["losses"] == pytest.approx(after["losses"], rel=1e-5)
    assert found["total"] == pytest.approx(after["total"], rel=1e-5)
    # and on another split, also in steps that the user gives
    test = evaluated(there / name, "task.evaluate=test", "train.batch_size=4")
    assert test.judged["scores"].keys() == {"test"} and test.judged["examples"] == 30
    # a path that is given now is one of here
    write_task(tmp_path / "task", seed=5)
    (tmp_path / "task" / "test.tsv").write_text("text\tlabel\nw5 w6\tyes\n")
    here = evaluated(there / name, "task.source=task", "task.evaluate=test")
    assert here.judged["examples"] == 1
    # one answer is all there is to one example
    assert here.kept == (Kept(None, None, None) if name == "student" else None)


def test_what_a_student_keeps_of_its_teacher_is_known_as_well_as_the_examples_tell(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = tmp_path / "n.json"
    said = run_whole("evaluate", there / "student", "--output", str(numbers))
    found = json.loads(numbers.read_text())
    floor, teacher = found["baseline"]["score"], found["teacher"]["score"]
    kept = found["kept"]
    assert kept["share"] == pytest.approx((found["score"] - floor) / (teacher - floor))
    assert f"of the teacher: {kept['share']:.1%} [" in said
    # of means over examples the spread is that of what each of them adds
    _, *rows = (there / "task" / "dev.tsv").read_text().splitlines()
    labels = np.array([row.endswith("\tyes") for row in rows])
    again = evaluated(there / "student")
    right = [found["dev"].argmax(1) == labels for found in (again.outputs, again.teacher_outputs)]
    added = right[0] - (1 - kept["share"]) * (labels == 0) - kept["share"] * right[1]
    error = float(np.std(added)) / math.sqrt(len(labels)) / (teacher - floor)
    # that of 1,000 draws is known to 2 %
    assert kept["high"] - kept["share"] == pytest.approx(1.96 * error, rel=0.1)
    assert kept["low"] + kept["high"] == pytest.approx(2 * kept["share"])
    # where the teacher knows nothing there is nothing to keep
    write_task(tmp_path / "task", seed=5)
    (tmp_path / "task" / "dev.tsv").write_text("text\tlabel\nw5 w6\tyes\n")
    said = run_whole("evaluate", there / "student", "task.source=task")
    assert "it is not above one answer to everything by two standard errors" in said


def test_the_command_line_scores_a_teacher_on_a_test_split(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = tmp_path / "n.json"
    said = run_whole("evaluate", there / "tuned", "task.evaluate=test", "--output", str(numbers))
    found = json.loads(numbers.read_text())
    assert f"{found['score']:.4f}" in said
    assert found["scores"] == evaluated(there / "tuned", "task.evaluate=test").judged["scores"]


def test_doctor_estimates_a_fine_tuning_run(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(there)
    said = run_whole("doctor", there / "tuned.yaml", "task.max_length=16", "run.output=none")
    for expected in ("model parameters", "examples to train on", "model weights", "optimiser"):
        assert expected in said
    assert "teacher" not in said
    assert not (there / "none").exists()


def test_runs_whose_working_folder_is_gone_are_read_as_they_stand(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(there / "tuned")
    said = json.loads(run.environment.read_text())
    assert said["folder"] == [".."] and str(there) not in run.environment.read_text()
    assert load_any_recipe(run.recipe).model_dump()["task"]["source"] == "task"
    monkeypatch.chdir(tmp_path)
    assert run.started_in == there
    try:
        for text in ({**said, "folder": ["/nowhere"]}, {**said, "folder_digest": "0"}, None):
            if text is None:
                run.environment.unlink()
            else:
                run.environment.write_text(json.dumps(text))
            assert run.started_in is None
            assert run.read_recipe() == load_any_recipe(run.recipe)
    finally:
        run.environment.write_text(json.dumps(said))


def recipe_of(**places: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "teacher": {"model": "org/model"},
        "student": {"layers": 2},
        "losses": {"hidden": {}},
        "data": {"train": ["python-docs"]},
        "run": {"output": "run"},
    }
    for key, value in places.items():
        section, name = key.split("__")
        tree[section][name] = value
    return tree


def test_names_of_folders_are_told_from_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = tmp_path / "h[e]re", tmp_path / "other"
    for folder in ("teacher", "random", "python-docs", "org/model", "text", "start"):
        (here / folder).mkdir(parents=True)
    (here / "text" / "a.txt").write_text("a")
    other.mkdir()
    monkeypatch.chdir(here)
    tree = recipe_of(
        data__train=["python-docs", "text/*.txt", "text", "hub/name", "~/text", "nothing/*.txt"],
        data__heldout="text/a.txt",
        student__init="teacher",
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run = RunFolder(tmp_path / "run")
    run.create(load_any_recipe(tmp_path / "recipe.yaml"))
    monkeypatch.chdir(other)
    found = run.read_recipe()
    assert found.teacher.model == str(here / "org" / "model")  # type: ignore[union-attr]
    assert found.student.init == "teacher"  # type: ignore[union-attr]
    data = found.data  # type: ignore[union-attr]
    text = str(here / "text")
    glob = f"{tmp_path}/h[[]e]re/text/*.txt"
    assert data.train == ("python-docs", glob, text, "hub/name", "~/text", "nothing/*.txt")
    assert data.heldout == (text + "/a.txt",)
    given = run.read_recipe(["data.train=text", "teacher={model: teacher}"])
    assert given.data.train == ("text",)  # type: ignore[union-attr]
    assert given.teacher.model == "teacher"  # type: ignore[union-attr]
    assert given.data.heldout == (text + "/a.txt",)  # type: ignore[union-attr]


def test_a_run_is_continued_with_the_same_files_wherever_they_are_named_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one/model", "two/model"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(teacher__model="model")))
    run = RunFolder(tmp_path / "run")
    run.create(load_any_recipe(path))
    run.check_continues(load_any_recipe(path))
    monkeypatch.chdir(tmp_path / "two")
    # the same word, another model
    with pytest.raises(UserError, match=r"started with teacher.model='.*/one/model', now '.*/two/"):
        run.check_continues(load_any_recipe(path))
    run.check_continues(load_any_recipe(path, ["teacher.model=../one/model"]))
    run.check_continues(load_any_recipe(path, [f"teacher.model={tmp_path / 'one' / 'model'}"]))


def test_text_runs_of_epochs_are_evaluated_on_other_text_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(tmp_path, train={**EPOCHS, "warmup_steps": 0}, data={"heldout_blocks": 3})
    done = run_command("distill", str(recipe))
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    after = summary_of(run)["after"]
    assert after["blocks"] == 3
    # what is no text leaves the blocks as they were, spread over all that is held out
    for overrides in ([], ["train.micro_batch_size=2"], ["data.workers=0", "data.cache=elsewhere"]):
        overrides = [text.replace("elsewhere", str(tmp_path / "elsewhere")) for text in overrides]
        assert evaluated(run, *overrides).losses == pytest.approx(after["losses"], rel=1e-5)
    assert not caplog.records
    assert evaluated(run, "data.heldout_blocks=4").judged["blocks"] == 4
    other = write_text(tmp_path / "other.txt", documents=20, seed=9)
    found = evaluated(run, f"data.heldout={other}")
    assert found.losses.keys() == after["losses"].keys()
    assert "held-out blocks are the first of this text" in caplog.text


def test_doctor_estimates_every_stage(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(there)
    stages = "[{train: {steps: 7}}, {train: {epochs: 2}, losses: {logits: {}}}]"
    student = there / "student.yaml"
    said = run_whole(
        "doctor", student, f"stages={stages}", "run.output=none", "losses={hidden: {}}"
    )
    first, second = said.split("stage 2 of 2")
    assert "stage 1 of 2" in first and re.search(r"to train on\W+56 ", first)
    # 96 examples in batches of 8, twice
    assert re.search(r"to train on\W+192 ", second)
    assert not (there / "none").exists()


REFUSED = {
    "another student": (["student.layers=3"], "'student.layers=3': the run is made, so"),
    "other losses": (["losses.hidden={}"], "takes values of data, task, evaluate, teacher, tr"),
    "another model": (["model.name=encoder"], "'model.name=encoder': the run is made, so"),
    "an unknown key": (["task.evalute=test"], "did you mean 'evaluate'?"),
    "no such split": (["task.evaluate=nothing"], "no nothing.tsv of tiny"),
    "a teacher of another shape": (["task.labels=[a, b, c]"], "tiny needs 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_overrides_that_do_not_fit_are_one_line(
    name: str, there: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, expected = REFUSED[name]
    monkeypatch.chdir(there)
    assert fastkd("evaluate", "student", *overrides, monkeypatch=monkeypatch) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert expected in lines[-1] and sum("fastkd: " in line for line in lines) == 1


def test_a_folder_without_a_finished_run_is_refused(there: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished run"):
        evaluated(tmp_path)
    check_overrides(["task.evaluate=test", "train={batch_size: 3}", "data=null"])
    check_overrides(["model.attention=eager", "student.attention=eager", "teacher.dtype=float16"])
