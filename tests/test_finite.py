"""A run whose numbers are not finite ends with exit code 2, before anything is saved of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import make_recipe, refused_variants, run_command, run_script
from tiny_training import fastkd, save_classifier, save_encoder, write_recipe, write_task

from fastkd.distributed import Ranks
from fastkd.training.finite import (
    blame,
    broken_weights,
    first_broken,
)
from fastkd.training.summary import worsened
from fastkd.training.teacher import NoTeacher


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path)


def assert_nothing_of_it(run: Path) -> None:
    """See that a run left no student, no summary, and no number that is not finite."""
    assert not (run / "student").exists() and not (run / "summary.json").exists()
    metrics = run / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        assert first_broken(json.loads(line)) is None


def refused(recipe: Path, *arguments: str, ranks: int = 1) -> str:
    """The line that a run ends with."""
    done = run_command("distill", str(recipe), *arguments, ranks=ranks)
    assert done.returncode == (2 if ranks == 1 else 1), done.stdout[-500:] + done.stderr[-2000:]
    assert_nothing_of_it(recipe.parent / "run")
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastkd: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    return lines[0]


FAILING = {
    "skipped for good": (
        ["losses.hidden.weight=1e38", "train.log_every=6"],
        ("the gradient of steps 1 to 6 is not finite, and 6 of them skipped", "losses.hidden a"),
    ),
    "the last step": (
        ["train.steps=1", "train.warmup_steps=0", "train.learning_rate=1e38"],
        ("held out: loss attention/1-2 is not finite", "a smaller train.learning_rate"),
    ),
    # every loss is finite, and their sum isn't
    "the total": (
        ["losses.hidden.weight=3e38", "losses.attention.weight=3e38", "train.warmup_steps=0"],
        ("is not finite at step 1", "give losses."),
    ),
    # with a transport: its linear program has no solution then
    "a transport": (
        ["layer_map=emd", "train.learning_rate=1e30", "train.log_every=5"],
        ("is not finite at step 3", "a smaller train.learning_rate"),
    ),
}


def test_a_run_that_fails_leaves_nothing_of_it(recipe: Path) -> None:
    runs = {name: recipe.parent / name.replace(" ", "-") for name in FAILING}
    variants = [[f"run.output={runs[name]}", *FAILING[name][0]] for name in FAILING]
    for name, said in zip(FAILING, refused_variants(recipe, variants), strict=True):
        for expected in (*FAILING[name][1], "the student or the loss made it"):
            assert expected in said, (name, said)
        assert_nothing_of_it(runs[name])
        assert not (runs[name] / "checkpoints").exists(), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_step_is_named_and_the_newest_checkpoint_stays(recipe: Path, ranks: int) -> None:
    # a longer window than the run is long
    more = ("train.learning_rate=1e30", "train.log_every=100", "train.checkpoint_every=1")
    said = refused(recipe, *more, ranks=ranks)
    # the first step of a warm-up is made with a learning rate of zero
    assert "not finite at step 3" in said and "the student or the loss made it" in said
    folders = sorted(p.name for p in (recipe.parent / "run" / "checkpoints").glob("step-*"))
    assert folders == ["step-00000001", "step-00000002"]
    for name in folders:
        assert (recipe.parent / "run" / "checkpoints" / name / "manifest.json").is_file()


def spoil(weights: Path, name: str, value: float = math.nan) -> None:
    """Put one number in the place of one of a model's weights."""
    found = load_file(weights)
    found[name].view(-1)[-1] = value
    save_file(found, weights, metadata={"format": "pt"})


def test_one_weight_of_the_teacher_is_the_teachers_fault(recipe: Path) -> None:
    # of the last word's embedding, which no trial reads
    name = "embeddings.word_embeddings.weight"
    spoil(recipe.parent / "teacher" / "model.safetensors", name)
    said = refused(recipe)
    assert f"/teacher: {name} not finite (NaN or inf)" in said
    assert not (recipe.parent / "run").exists()


def test_so_it_is_with_a_start_and_with_a_model_to_tune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "task")
    save_encoder(tmp_path / "encoder")
    save_classifier(tmp_path / "classifier")
    start = save_classifier(tmp_path / "start", num_hidden_layers=2)
    layer = "encoder.layer.0.output.dense.bias"
    spoil(start / "model.safetensors", f"bert.{layer}")
    spoil(tmp_path / "encoder" / "model.safetensors", layer, math.inf)
    tuned = write_recipe(tmp_path, "tuned")
    assert fastkd("finetune", str(tuned), monkeypatch=monkeypatch) == 2
    assert f"encoder: bert.{layer} not finite" in capfd.readouterr().err
    student = write_recipe(tmp_path, "run", student={"layers": 2, "init": str(start)})
    assert fastkd("distill", str(student), monkeypatch=monkeypatch) == 2
    assert f"start: bert.{layer} not finite" in capfd.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "tuned").exists()


def test_a_teacher_that_overflows_on_a_batch_is_named(recipe: Path) -> None:
    """Weights that are finite, and states that are not: only the batch shows it."""
    for moment in ("teacher overflows in the evaluation", "teacher overflows in step 2"):
        output = f"run.output={recipe.parent / moment.replace(' ', '-')}"
        done = run_script("disturbed_run.py", moment, "0", str(recipe), output, "train.log_every=4")
        assert done.returncode == 2, done.stderr[-2000:]
        said = done.stderr.strip().splitlines()[-1]
        assert "the teacher made it (the state of layer 2 of the teacher is not finite)" in said
        assert ("at step 2" in said) == ("step 2" in moment)
        assert "teacher.dtype float32" in said and "learning_rate" not in said


def test_a_run_that_ends_worse_than_it_began_says_so(recipe: Path) -> None:
    done = run_command("distill", str(recipe), "train.learning_rate=3", "train.max_grad_norm=0")
    assert done.returncode == 0, done.stderr[-2000:]
    run = recipe.parent / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["total"] > summary["before"]["total"]
    said, cosine = summary["worse"]
    assert cosine.startswith("sentence cosine ")
    assert said.startswith("held-out loss ") and f"before {summary['before']['total']:.4g}" in said
    assert f"worse than before: {said}" in done.stdout
    assert said in (run / "report.html").read_text()


def test_what_got_worse() -> None:
    one, two = {"total": 1.0, "score": 0.5}, {"total": 1.3e26, "score": 0.25}
    assert worsened(one, two) == [
        "held-out loss 1.3e+26, before 1",
        "score 0.2500, before 0.5000",
    ]
    assert worsened(two, one) == worsened(one, one) == []
    assert worsened({"total": 1.0}, {"total": 1.0 + 1e-7}) == []


def test_what_got_worse_in_numbers_that_have_a_direction_each() -> None:
    one: dict[str, Any] = {
        "total": 1.0,
        "sentence_cosine": 0.9,
        "perplexity": 20.0,
        "pseudo_perplexity": 4.5,
        "agreement": {"spearman": -0.1, "same_first": 0.8, "mean_absolute_difference": 0.25},
        "pairs": {"a_b": 0.7},
        "mteb": {},
    }
    two: dict[str, Any] = {
        "total": 1.0,
        "sentence_cosine": 0.5,
        "perplexity": 32767.123,
        "pseudo_perplexity": 5.5,
        "agreement": {"spearman": -0.2, "same_first": 0.75, "mean_absolute_difference": 3.5},
        "pairs": {"a_b": 0.625},
        "mteb": {},
    }
    assert worsened(one, two) == [
        "sentence cosine 0.5000, before 0.9000",
        "perplexity 3.277e+04, before 20",
        "pseudo perplexity 5.5, before 4.5",
        "spearman -0.2000, before -0.1000",
        "same first 0.7500, before 0.8000",
        "mean absolute difference 3.5, before 0.25",
        "a_b 0.6250, before 0.7000",
    ]
    assert worsened(two, one) == worsened(one, one) == []
    unknown = {**one, "sentence_cosine": None}
    assert worsened(one, unknown) == worsened(unknown, one) == []


def test_a_run_without_a_teacher_blames_its_model() -> None:
    assert blame(None, NoTeacher(), "do this") == "the model made it; do this"


def test_numbers_are_found_by_name() -> None:
    assert first_broken({"a": 1.0, "b": {"c": math.inf}, "d": math.nan}) == "b.c"
    assert first_broken({"a": 1, "b": None, "c": "nan", "d": {}}) is None


@pytest.mark.parametrize("place", ["weight", "master", "moment"])
def test_every_part_of_an_engine_is_looked_at(place: str) -> None:
    module = torch.nn.Linear(3, 2)
    master = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([master])
    master.sum().backward()
    optimizer.step()
    engine: Any = SimpleNamespace(module=module, optimizer=SimpleNamespace(optimizer=optimizer))
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert broken_weights(engine, ranks) == []
    with torch.no_grad():
        if place == "weight":
            module.bias[1] = math.inf
        elif place == "master":
            master[2] = math.nan
        else:
            optimizer.state[master]["exp_avg_sq"][0] = math.inf
    expected = {
        "weight": "bias",
        "master": "the master weights",
        "moment": "the moments of the optimiser",
    }
    assert broken_weights(engine, ranks) == [expected[place]]
