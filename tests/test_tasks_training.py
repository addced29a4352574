"""Distillation on a task: how a step is cut changes nothing, stages, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import POSITIONS
from tiny_runs import assert_same_run, read_losses, read_weights, run_script
from tiny_tasks import SENTENCES, SYNONYMS, word_tokenizer
from tiny_training import (
    fastkd,
    run_whole,
    save_classifier,
    save_encoder,
    summary_of,
    write_recipe,
    write_task,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

from fastkd.data.augmentation import Augmentation
from fastkd.distributed import start_ranks, stop_ranks
from fastkd.layer_map import make_layer_map
from fastkd.layer_map.sections import RandomSection
from fastkd.recipe import TaskAugmentation, load_recipe, stage_recipes
from fastkd.training.evaluate_run import evaluate_run
from fastkd.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier")
    return tmp_path


@pytest.mark.parametrize("reduction", ["valid", "tinybert"])
def test_micro_batches_change_nothing(folder: Path, reduction: str) -> None:
    losses = {"attention": {}, "hidden": {}, "logits": {"kind": "kl"}, "labels": {}}
    losses["reduction"] = reduction
    for name, size in (("whole", None), ("cut", 2)):
        train = {"micro_batch_size": size, "steps": 4, "max_grad_norm": 0.5}
        recipe = write_recipe(folder, name, losses=losses, train=train)
        run_whole("distill", recipe)
    assert_same_run(folder / "cut", folder / "whole", losses=1e-5, weights=1e-5)
    whole, cut = (summary_of(folder / name)["after"] for name in ("whole", "cut"))
    assert cut["score"] == whole["score"]
    assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-5)


def test_each_model_reads_the_held_out_data_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: Counter[int] = Counter()
    forward = BertForSequenceClassification.forward

    def counted(model: BertForSequenceClassification, *args: Any, **kwargs: Any) -> Any:
        passes[id(model)] += 1
        return forward(model, *args, **kwargs)

    run_whole("distill", write_recipe(folder, "run", train={"steps": 1}))
    monkeypatch.setattr(BertForSequenceClassification, "forward", counted)
    ranks = start_ranks()
    try:
        found = evaluate_run(RunFolder(folder / "run"), [], ranks)
    finally:
        stop_ranks()
    # 40 examples in batches of 8, after two passes in which a model is tried
    assert sorted(passes.values()) == [5 + 2, 5 + 2]
    after = summary_of(folder / "run")["after"]
    assert {"score", "scores", "examples"} <= found.judged.keys()
    assert found.of_student().keys() == after.keys()
    assert found.judged == {key: after[key] for key in found.judged}


def test_scores_are_what_the_models_say(folder: Path) -> None:
    # a second set, shorter and mostly of one class
    header, *rows = (folder / "task" / "train.tsv").read_text().splitlines()
    second = [row for row in rows if row.endswith("\tyes")][:9] + rows[:10:2]
    (folder / "task" / "more.tsv").write_text("\n".join([header, *second]) + "\n")
    sets = ("dev", "more")
    task = {"evaluate": list(sets), "metrics": ["accuracy", "f1"]}
    # long enough for a student that says both classes
    train = {"steps": 40, "learning_rate": 5e-3}
    run_whole("distill", write_recipe(folder, "run", task=task, losses={"labels": {}}, train=train))

    def scores_of(model: Path, split: str) -> dict[str, float]:
        lines = (folder / "task" / f"{split}.tsv").read_text().splitlines()[1:]
        texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
        wanted = torch.tensor([label == "yes" for label in labels])
        classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        with torch.no_grad():
            logits = [classifier(**tokenizer(t, return_tensors="pt")).logits for t in texts]
        said = torch.cat(logits).argmax(dim=-1) == 1
        f1 = 2 * (said & wanted).sum() / (said.sum() + wanted.sum())
        return {"accuracy": float((said == wanted).float().mean()), "f1": float(f1)}

    summary = summary_of(folder / "run")
    for of, model in (("teacher", folder / "classifier"), ("after", folder / "run" / "student")):
        scores = {split: scores_of(model, split) for split in sets}
        for split, found in summary[of]["scores"].items():
            assert found == pytest.approx(scores.pop(split)), (of, split)
        assert not scores
        everything = [v for found in summary[of]["scores"].values() for v in found.values()]
        assert summary[of]["score"] == pytest.approx(sum(everything) / len(everything)), of
    assert min(everything) > 0.8, "this student tells the classes apart"


def test_a_random_map_follows_the_seed_of_the_run(folder: Path) -> None:
    def drawn(seed: int) -> list[tuple[int, int]]:
        return make_layer_map(RandomSection(redraw="run"), 2, 4, seed=seed).pairs

    seed = next(seed for seed in range(1, 100) if drawn(seed) != drawn(0))
    recipe = write_recipe(
        folder,
        "run",
        layer_map={"kind": "random", "redraw": "run"},
        losses={"hidden": {}, "attention": {"layer_map": {"kind": "random", "redraw": "run"}}},
        train={"steps": 1, "seed": seed},
    )
    run_whole("distill", recipe)
    found = summary_of(folder / "run")["after"]["losses"]
    pairs = {f"{s}-{t}" for s, t in drawn(seed)}
    assert {label.split("/")[1] for label in found} == pairs
    assert {label.split("/")[0] for label in found} == {"hidden", "attention"}
    # and so does an evaluation of what was exported
    assert "hidden/" + min(pairs) in run_whole("evaluate", folder / "run")


def test_two_ranks_change_nothing(folder: Path) -> None:
    # 7 held-out batches: the second rank has one less
    train = {"steps": 3, "micro_batch_size": 6, "batch_size": 12}
    recipe = write_recipe(folder, "one", train=train)
    run_whole("distill", recipe)
    recipe = write_recipe(folder, "two", train=train)
    done = run_script("run_recipes.py", str(recipe), "[[]]", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(folder / "two", folder / "one", losses=1e-5, weights=1e-5)
    one, two = (summary_of(folder / name) for name in ("one", "two"))
    assert two["teacher"] == one["teacher"]
    assert two["after"]["scores"] == one["after"]["scores"]
    assert two["after"]["losses"] == pytest.approx(one["after"]["losses"], rel=1e-5)


STAGES = [
    {
        "losses": {"attention": {}, "hidden": {}, "embedding": {}},
        "train": {"epochs": 1 / 6, "learning_rate": 2e-3},
    },
    {"losses": {"logits": {"kind": "cross_entropy"}}, "train": {"steps": 3}},
]


def test_stages_follow_each_other_and_resume_where_they_stopped(folder: Path) -> None:
    recipe = write_recipe(folder, "staged", losses=None, stages=STAGES)
    tree = yaml.safe_load(recipe.read_text())
    del tree["losses"]
    recipe.write_text(yaml.safe_dump(tree))
    # the third step of all is the first of stage 2
    stopped = run_script("disturbed_run.py", "Ctrl-C in step 3", "0", str(recipe))
    assert stopped.returncode == 130, stopped.stderr[-2000:]
    run = folder / "staged"
    assert not (run / "summary.json").exists()
    assert (run / "stage-2" / "checkpoints" / "step-00000001").is_dir()
    first = (run / "stage-1" / "summary.json").stat().st_mtime_ns
    run_whole("distill", recipe, "--resume")
    assert (run / "stage-1" / "summary.json").stat().st_mtime_ns == first

    summary = summary_of(run)
    one, two = summary["stages"]
    assert (one["steps"], two["steps"], summary["steps"]) == (2, 3, 5)
    assert one["before"] == summary["before"] and two["after"] == summary["after"]
    assert set(one["after"]["losses"]) != set(two["after"]["losses"]) == {"logits"}
    # the second starts exactly where the first ended
    assert two["before"]["score"] == one["after"]["score"]
    last = read_weights(run / "stage-2")
    model = AutoModelForSequenceClassification.from_pretrained(run / "student")
    assert all(last[name].equal(weight) for name, weight in model.named_parameters())
    assert (run / "stage-1" / "report.html").is_file()
    card = (run / "student" / "README.md").read_text()
    digest = json.loads((run / "stage-1" / "models.json").read_text())["teacher.model"]
    assert "\n# staged\n" in card and digest["model.safetensors"] in card
    assert str(folder) not in card and "\n# stage-2\n" not in card
    # finished: nothing is run again
    run_whole("distill", recipe, "--resume")
    assert len(read_losses(run / "stage-2")) == 3
    run_whole("evaluate", run, "--output", str(folder / "e.json"))
    assert json.loads((folder / "e.json").read_text())["score"] == summary["after"]["score"]


def test_a_stage_replaces_losses_and_rivals_and_keeps_the_rest(folder: Path) -> None:
    train = {"epochs": 2, "steps": None, "warmup_share": 0.2, "weight_decay": 0.5}
    recipe = load_recipe(write_recipe(folder, "staged", stages=STAGES, train=train))
    one, two = stage_recipes(recipe)
    assert set(one.losses.terms) == {"attention", "hidden", "embedding"}
    assert set(two.losses.terms) == {"logits"}
    assert (one.train.epochs, two.train.epochs, two.train.steps) == (1 / 6, None, 3)
    assert two.train.weight_decay == 0.5
    assert two.student.init == f"{folder / 'staged'}/stage-1/student"


def test_augmented_examples_are_trained_on_and_not_scored(folder: Path) -> None:
    word_tokenizer().save_pretrained(folder / "classifier")
    for split, count in (("train", 4), ("dev", 2)):
        rows = [f"{text}\t{('no', 'yes')[n % 2]}" for n, text in enumerate(SENTENCES)] * count
        (folder / "task" / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    list_of = folder / "synonyms.tsv"
    list_of.write_text("\n".join(SYNONYMS) + "\n")
    augmentation = {"source": "neighbours", "synonyms": str(list_of), "copies": 3}
    recipe = write_recipe(folder, "run", task={"augmentation": augmentation}, train={"steps": 1})
    run_whole("distill", recipe)
    summary = summary_of(folder / "run")
    # three of the five sentences have a word of the list; a copy like another is left out
    assert 20 < summary["task_examples"] <= 20 + 12 * 3
    assert summary["after"]["examples"] == 10


def test_the_settings_of_augmentation_are_those_of_the_task_data() -> None:
    section = {name: field.default for name, field in TaskAugmentation.model_fields.items()}
    assert section == {field.name: field.default for field in fields(Augmentation)}


REFUSED = {
    "data and task": ({"data": {"train": "x.txt"}}, "data and task are both given"),
    "another head": ({"student": {"head": "none"}}, "student.head is none, but a task is lear"),
    "unknown stage key": (
        {"stages": [{"teacher": {"model": "x"}}]},
        "stages.1.teacher: all stages share this",
    ),
    "unknown field of a stage": (
        {"stages": [{"train": {"stepz": 1}}]},
        "stages.1: train.stepz: unknown key; did you mean 'steps'?",
    ),
    "a start of another shape": (
        {"student": {"init": "encoder"}},
        "has num_hidden_layers 4, but the student is to have 2; set student.layers=4",
    ),
    "no start": ({"student": {"init": "/nowhere"}}, "student.init /nowhere: not loadable"),
    "an untrained head": (
        {"teacher": {"model": "encoder"}},
        "its head was never trained, 2 weights are missing, classifier.bias among them",
    ),
    "another number of classes": (
        {"task": {"labels": ["no", "yes", "perhaps"]}},
        "its head gives 2 numbers, but task tiny needs 3 (no, yes, perhaps)",
    ),
    "more tokens than positions": (
        {"task": {"max_length": POSITIONS + 1}},
        "but task.max_length is 65",
    ),
    "augmentation of words that the list doesn't have": (
        {"task": {"augmentation": {"source": "neighbours", "synonyms": "words.tsv"}}},
        "task.augmentation: no word of the 96 examples has a candidate in words.tsv",
    ),
    "augmentation without a model": (
        {"task": {"augmentation": {}}},
        "augmentation.masked_model: missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_one_line_and_exit_code_2(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save_encoder(folder / "encoder")
    (folder / "words.tsv").write_text("dog\tcat\n")
    monkeypatch.chdir(folder)
    changes, expected = REFUSED[name]
    recipe = write_recipe(folder, "run", **changes)
    capfd.readouterr()
    assert fastkd("distill", str(recipe), monkeypatch=monkeypatch) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert expected in lines[-1]
    assert sum("fastkd: " in line for line in lines) == 1
    assert not (folder / "run").exists()
