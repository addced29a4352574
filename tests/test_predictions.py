"""What a run's folder says of each example: what its student and its teacher give for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import run_script
from tiny_training import (
    distillation,
    save_classifier,
    save_encoder,
    task_section,
    write_recipe,
    write_task,
)
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import fastkd
from fastkd.errors import UserError
from fastkd.recipe import parse_recipe

SETS = ["dev", "train"]
# from a good start to a rate that ruins it
TRAIN = {
    **{"steps": 8, "evaluate_every": 2, "checkpoint_every": 4},
    **{"learning_rate": 6e-3, "schedule": "constant"},
}
KEPT = {"run.predictions": True, "run.keep_best": "score"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("predictions")
    write_task(made / "task")
    save_classifier(made / "classifier")
    save_encoder(made / "encoder")
    write_recipe(made, "student", task={"evaluate": SETS}, train=TRAIN)
    return made


@pytest.fixture(scope="module")
def kept(folder: Path) -> fastkd.RunResult:
    output = {"run.output": str(folder / "kept")}
    return fastkd.distill(folder / "student.yaml", {**KEPT, **output}, quiet=True)


def read(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "predictions.npz", allow_pickle=False) as file:
        return dict(file)


def outputs_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> Any:
    lines = file.read_text().splitlines()[1:]
    texts = [line.split("\t")[0] for line in lines]
    with torch.no_grad():
        made = [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]
    return torch.cat(made).numpy()


def test_they_are_those_of_the_exported_student_and_its_teacher(
    folder: Path, kept: fastkd.RunResult
) -> None:
    found = read(kept.folder)
    kinds = ("labels", "outputs", "teacher")
    assert sorted(found) == sorted([f"{name}/{kind}" for name in SETS for kind in kinds] + ["step"])
    assert found["step"] == kept.summary["exported_step"] < kept.summary["steps"]
    classifier = folder / "classifier"
    teacher = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    for name in SETS:
        file = folder / "task" / f"{name}.tsv"
        for kind, model in (("outputs", kept.student), ("teacher", teacher)):
            given = found[f"{name}/{kind}"]
            assert given.dtype == np.float32
            expected = outputs_of(model, kept.tokenizer, file)
            np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)
        labels = [line.split("\t")[1] == "yes" for line in file.read_text().splitlines()[1:]]
        assert found[f"{name}/labels"].tolist() == labels
        said = found[f"{name}/outputs"].argmax(axis=1)
        accuracy = kept.summary["after"]["scores"][name]["accuracy"]
        assert (said == labels).mean() == pytest.approx(accuracy)


@pytest.fixture(scope="module")
def last(folder: Path) -> fastkd.RunResult:
    given = {"run.predictions": True, "run.output": str(folder / "last"), "train.steps": 3}
    return fastkd.distill(folder / "student.yaml", given, quiet=True)


def test_they_are_those_of_the_last_step_where_no_better_is_kept(
    folder: Path, last: fastkd.RunResult
) -> None:
    found = read(last.folder)
    assert found["step"] == 3
    expected = outputs_of(last.student, last.tokenizer, folder / "task" / "dev.tsv")
    np.testing.assert_allclose(found["dev/outputs"], expected, rtol=1e-4, atol=1e-5)


def test_sharded_ranks_write_one_file(folder: Path, last: fastkd.RunResult) -> None:
    output = folder / "ranks"
    given = ["run.predictions=true", f"run.output={output}", "train.steps=3", "train.zero_stage=3"]
    path = str(folder / "student.yaml")
    done = run_script("run_recipes.py", path, json.dumps([given]), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    found, expected = read(output), read(last.folder)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_run_that_was_interrupted_leaves_the_same_bytes(
    keeps: bool, folder: Path, kept: fastkd.RunResult
) -> None:
    output = folder / f"stopped-{keeps}"
    given = {**KEPT, "run.output": str(output)}
    expected = kept.folder
    if not keeps:
        given["run.keep_best"] = None
        whole = {**given, "run.output": str(folder / "whole")}
        expected = fastkd.distill(folder / "student.yaml", whole, quiet=True).folder

    def stop(step: int, _found: fastkd.Evaluation) -> None:
        # two steps after the last checkpoint
        if step == 6:
            raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        fastkd.distill(folder / "student.yaml", given, quiet=True, on_evaluate=stop)
    # what is there is of no use: lost, or of a step that is made again
    (output / "predictions.npz").write_bytes(b"half of a file")
    seen = []

    def look(step: int, _found: fastkd.Evaluation) -> None:
        seen.append(int(read(output)["step"]))

    fastkd.distill(folder / "student.yaml", given, quiet=True, resume=True, on_evaluate=look)
    names = ("predictions.npz", "student/model.safetensors")
    for name in names:
        assert (output / name).read_bytes() == (expected / name).read_bytes()
    assert len(seen) == 2 and (keeps or seen == [6, 8])


def test_a_checkpoint_says_what_was_predicted(folder: Path, kept: fastkd.RunResult) -> None:
    # before a step is made again, the file of a later one is gone
    output = folder / "back"
    given = {**KEPT, "run.output": str(output), "run.keep_best": None}
    steps: list[int] = []

    def stop(step: int, found: Any) -> None:
        steps.append(int(read(output)["step"]))
        if step in (5, 6):
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        fastkd.distill(folder / "student.yaml", given, quiet=True, on_evaluate=stop)
    assert steps == [0, 2, 4, 6]
    with pytest.raises(KeyError):
        fastkd.distill(folder / "student.yaml", given, quiet=True, resume=True, on_step=stop)
    assert steps[-1] == 4


def test_of_stages_the_last_one_counts(folder: Path) -> None:
    losses = distillation(folder)["losses"]
    stages = [{"train": {"steps": 2}}, {"losses": {"logits": {}}, "train": {"steps": 1}}]
    kept = {"predictions": True}
    path = write_recipe(folder, "staged", losses=losses, stages=stages, run=kept)
    run = fastkd.distill(path, quiet=True).folder
    files = [run / name / "predictions.npz" for name in ("", "stage-1", "stage-2")]
    whole, first, last = (file.read_bytes() for file in files)
    assert whole == last != first
    assert [int(read(file.parent)["step"]) for file in files] == [1, 2, 1]


def test_a_fine_tuned_model_has_no_teacher(folder: Path) -> None:
    write_task(folder / "scores", scores=True)
    task = {"source": str(folder / "scores"), "labels": None, "bounds": [0, 5]}
    path = write_recipe(folder, "tuned", task=task, train={"steps": 1}, run={"predictions": True})
    found = read(fastkd.finetune(path, quiet=True).folder)
    assert sorted(found) == ["dev/labels", "dev/outputs", "step"]
    assert found["dev/outputs"].shape == (40, 1) and set(found["dev/labels"]) == {0.5, 4.5}
    # unless it is asked for, nothing is written
    path = write_recipe(folder, "tuned-without", train={"steps": 1})
    assert not (fastkd.finetune(path, quiet=True).folder / "predictions.npz").exists()


WORDS = {"kind": "token_classification", "labels": ["O", "B-X"], "columns": None}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"train": "x.txt"}}, "but the recipe has no task; examples of a task of kind"),
        ({"task": {**task_section(Path("x")), **WORDS}}, "but task.kind is token_classification"),
    ],
)
def test_what_has_no_predictions_is_refused(sections: dict[str, Any], said: str) -> None:
    tree = {
        "teacher": {"model": "x"},
        "student": {"layers": 2},
        "losses": {"hidden": {}},
        "run": {"output": "x", "predictions": True},
        **sections,
    }
    with pytest.raises(UserError) as refused:
        parse_recipe(tree)
    assert f"run.predictions is true, {said}" in str(refused.value)


def test_a_lean_run_is_the_same_without_what_people_read(folder: Path) -> None:
    runs = {}
    for name, lean in (("read", False), ("lean", True)):
        changes = {"run.predictions": True, "train.evaluate_every": 0, "train.steps": 4}
        output = {"run.output": str(folder / name), "run.lean": lean}
        runs[name] = fastkd.distill(folder / "student.yaml", {**changes, **output}, quiet=True)
    whole, lean = runs["read"].summary, runs["lean"].summary
    assert lean["after"] == whole["after"]
    assert lean["before"] is None and not lean["worse"] and "speed" not in lean
    # the teacher is judged where it was heard first, to other last bits of sums
    assert lean["teacher"]["scores"] == whole["teacher"]["scores"]
    found, expected = read(folder / "lean"), read(folder / "read")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)
    assert not (folder / "lean" / "report.html").exists()
    assert not (folder / "lean" / "student" / "README.md").exists()
    with pytest.raises(UserError, match=r"was not evaluated before its first step \(run.lean\)"):
        runs["lean"].losses_before  # noqa: B018
    assert runs["lean"].losses_after == runs["read"].losses_after
    # and again, where it is finished
    again = fastkd.distill(folder / "lean" / "recipe.yaml", resume=True)
    assert again.summary == lean
