"""`fastkd finetune`: hard labels alone, a head where there was none, a teacher for `distill`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_batch
from tiny_runs import read_losses, read_weights, run_script
from tiny_training import (
    fastkd,
    run_whole,
    save_classifier,
    save_encoder,
    summary_of,
    write_recipe,
    write_task,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastkd.recipe import parse_finetune_recipe, resolve_steps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_task(tmp_path / "task")
    save_encoder(tmp_path / "encoder")
    return tmp_path


def test_a_tuned_model_beats_chance_and_teaches(folder: Path) -> None:
    train = {"steps": None, "epochs": 5, "learning_rate": 4e-3, "warmup_share": 0.1}
    recipe = write_recipe(folder, "tuned", train=train)
    said = run_whole("finetune", recipe)
    assert "head drawn by train.seed" in said and "60 steps" in said
    summary = summary_of(folder / "tuned")
    assert summary["steps"] == 60
    assert summary["layer_map"] is None and "teacher" not in summary
    assert summary["after"]["score"] > 0.9 > 0.7 > summary["before"]["score"]
    assert summary["after"]["scores"] == {"dev": {"accuracy": summary["after"]["score"]}}
    losses = [loss["labels"] for loss in read_losses(folder / "tuned")]
    assert losses[-1] < 0.5 * losses[0]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "tuned" / "student")
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.problem_type == "single_label_classification"
    # trained and handed on with its own rates
    assert model.config.hidden_dropout_prob == 0.1
    assert len(AutoTokenizer.from_pretrained(folder / "tuned" / "student")) == 64
    page = (folder / "tuned" / "report.html").read_text()
    assert "Score of the task" in page

    student = write_recipe(
        folder,
        "student",
        teacher={"model": str(folder / "tuned" / "student")},
        train={"steps": None, "epochs": 3, "learning_rate": 5e-3, "evaluate_every": 15},
    )
    run_whole("distill", student)
    found = summary_of(folder / "student")
    assert found["teacher"]["score"] == summary["after"]["score"]
    assert found["after"]["score"] > 0.8
    losses = [loss["logits"] for loss in read_losses(folder / "student")]
    assert sum(losses[-5:]) < sum(losses[:5])
    page = (folder / "student" / "report.html").read_text()
    assert ">teacher<" in page[page.index("Score of the task") :]
    lines = (folder / "student" / "metrics.jsonl").read_text().splitlines()
    scored = [r["step"] for r in map(json.loads, lines) if r["kind"] == "heldout"]
    assert scored == [0, 15, 30, 36]


def test_a_head_of_the_right_shape_is_kept(folder: Path) -> None:
    save_classifier(folder / "classifier")
    tiny = {"steps": 1, "learning_rate": 1e-30}
    recipe = write_recipe(folder, "tuned", model=str(folder / "classifier"), train=tiny)
    assert "head its own" in run_whole("finetune", recipe)
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(path).eval()
        for path in (folder / "classifier", folder / "tuned" / "student")
    )
    with torch.no_grad():
        torch.testing.assert_close(before(**tiny_batch()).logits, after(**tiny_batch()).logits)


def test_a_head_of_another_shape_is_drawn_by_the_seed(folder: Path) -> None:
    save_classifier(folder / "classifier", num_labels=3)
    heads = []
    for name, seed in (("tuned-a", 1), ("tuned-b", 1), ("tuned-c", 2)):
        train = {"steps": 1, "learning_rate": 1e-30, "seed": seed}
        recipe = write_recipe(folder, name, model=str(folder / "classifier"), train=train)
        run_whole("finetune", recipe)
        heads.append(read_weights(folder / name)["classifier.weight"])
    assert heads[0].shape == (2, 32)
    assert heads[0].equal(heads[1]) and not heads[0].equal(heads[2])


def test_regression_learns_and_teaches(folder: Path) -> None:
    write_task(folder / "task", scores=True)
    scores = {"labels": None, "bounds": [0, 5]}
    train = {"steps": 60, "learning_rate": 4e-3, "log_every": 10}
    recipe = write_recipe(folder, "tuned", task=scores, train=train)
    run_whole("finetune", recipe)
    found = summary_of(folder / "tuned")["after"]
    assert found["scores"]["dev"].keys() == {"pearson", "spearman"}
    assert found["scores"]["dev"]["pearson"] > 0.8
    config = AutoModelForSequenceClassification.from_pretrained(folder / "tuned" / "student").config
    assert (config.problem_type, config.num_labels) == ("regression", 1)
    student = write_recipe(
        folder,
        "student",
        task=scores,
        teacher={"model": str(folder / "tuned" / "student")},
        losses={"logits": {"kind": "mse"}},
        train={"steps": 40, "learning_rate": 4e-3},
    )
    run_whole("distill", student)
    losses = [loss["logits"] for loss in read_losses(folder / "student")]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert summary_of(folder / "student")["after"]["score"] > 0.7


def test_interrupted_in_the_middle_of_an_epoch_ends_bit_for_bit_alike(folder: Path) -> None:
    # 12 steps an epoch; dropout makes the random numbers matter
    train = {"steps": 15, "checkpoint_every": 7}
    for name in ("tuned-whole", "tuned-cut"):
        write_recipe(folder, name, train=train)
    moment = "Ctrl-C in step 3"
    arguments = str(folder / "tuned-cut.yaml")
    stopped = run_script("disturbed_run.py", moment, "0", "finetune", arguments)
    assert stopped.returncode == 130, stopped.stderr[-2000:]
    assert stopped.stderr.strip().splitlines()[-1].endswith("continue with --resume")
    assert (folder / "tuned-cut" / "checkpoints" / "step-00000003").is_dir()
    calm = ("-", "0", "finetune")
    for name, more in (("tuned-whole", ()), ("tuned-cut", ("--resume",))):
        done = run_script("disturbed_run.py", *calm, str(folder / f"{name}.yaml"), *more)
        assert done.returncode == 0, done.stderr[-2000:]
    mine, theirs = (read_weights(folder / name) for name in ("tuned-whole", "tuned-cut"))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert read_losses(folder / "tuned-whole") == read_losses(folder / "tuned-cut")


@pytest.mark.parametrize(
    ("train", "rate", "warmup"),
    [
        ({}, 5e-5, 20),
        ({"warmup_steps": 7}, 5e-5, 7),
        ({"warmup_steps": 0}, 5e-5, 0),
        ({"warmup_share": 0.2, "learning_rate": 1e-4}, 1e-4, 40),
    ],
)
def test_it_learns_as_slowly_as_models_are_tuned(
    train: dict[str, float], rate: float, warmup: int
) -> None:
    """BERT's rates (arXiv 1810.04805, appendix A.3), after a warm-up of a tenth of the steps."""
    task = {"name": "rte", "source": "glue"}
    tree = {"model": "m", "task": task, "train": {"steps": 200, **train}, "run": {"output": "r"}}
    recipe = parse_finetune_recipe(tree)
    found = resolve_steps(recipe.train, None)
    assert (found.learning_rate, found.warmup_steps) == (rate, warmup)
    # as a run's folder holds it
    assert parse_finetune_recipe(recipe.model_dump(mode="json")) == recipe


REFUSED = {
    "unknown key": ({"modl": "x"}, "modl: unknown key; did you mean 'model'?"),
    "a task that GLUE lacks": (
        {"task": {"name": "MRPX", "columns": None, "labels": None}},
        "task 'MRPX': not in GLUE; expected one of CoLA",
    ),
    "labels without columns": ({"task": {"columns": None}}, "task: labels is given without colu"),
    "source absent": ({"task": {"source": "/nowhere"}}, "/nowhere: no folder"),
    "missing column": (
        {"task": {"columns": {"texts": "sentence", "label": "label"}}},
        "no column 'sentence'; it has 'text', 'label'",
    ),
    "unknown label": ({"task": {"labels": ["no", "maybe"]}}, "label 'yes' of column 'label', exp"),
    "more tokens than positions": (
        {"task": {"max_length": 100}},
        "64 positions, but task.max_length is 100",
    ),
    "steps and epochs": ({"train": {"epochs": 2}}, "steps is 6 and epochs 2; give one of them"),
    "two warm-ups": (
        {"train": {"warmup_steps": 2, "warmup_share": 0.1}},
        "warmup_steps is 2 and warmup_share 0.1; give one of them and set the other to 0",
    ),
    "no model": ({"model": "/nowhere"}, "model /nowhere: not loadable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_one_line_and_exit_code_2(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changes, expected = REFUSED[name]
    recipe = write_recipe(folder, "tuned", **changes)
    capfd.readouterr()
    assert fastkd("finetune", str(recipe), monkeypatch=monkeypatch) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert expected in lines[-1]
    assert sum("fastkd: " in line for line in lines) == 1
    assert not (folder / "tuned").exists()


def test_a_recipe_of_the_other_command_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for command, name in (("distill", "tuned"), ("finetune", "student")):
        recipe = write_recipe(folder, name)
        assert fastkd(command, str(recipe), monkeypatch=monkeypatch) == 2
    said = capfd.readouterr().err.splitlines()
    assert said[0].endswith("this is a file of fastkd finetune, not of fastkd distill")
    assert said[1].endswith("this is a file of fastkd distill, not of fastkd finetune")
