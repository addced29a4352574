"""What a run may be continued with: more steps where none before depend on it, other cuts."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import (
    assert_same_run,
    keys,
    make_recipe,
    read_losses,
    read_weights,
    run_command,
    run_variants,
)
from tiny_training import save_classifier, save_encoder, summary_of, write_recipe, write_task

import fastkd
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.recipe import AnyRecipe, Recipe, parse_any_recipe
from fastkd.training import cost
from fastkd.training.continuation import (
    difference,
    in_force,
    longer,
    why_not_longer,
)
from fastkd.training.run_folder import RunFolder

CONSTANT = {"schedule": "constant", "warmup_steps": 1, "log_every": 1}
TREE: dict[str, Any] = {
    "teacher": {"model": "teacher"},
    "student": {"layers": 2},
    "losses": {"hidden": {}},
    "data": {"train": "text"},
    "train": {"schedule": "constant", "steps": 10},
    "run": {"output": "run"},
}
TUNED: dict[str, Any] = {
    "model": "model",
    "task": {"name": "rte", "source": "glue"},
    "train": {**TREE["train"], "learning_rate": 3e-4, "warmup_share": 0},
    "run": TREE["run"],
}


def _recipe(tree: dict[str, Any] = TREE, **sections: Any) -> AnyRecipe:
    both = {
        name: {**tree[name], **given} if isinstance(given, dict) and name in tree else given
        for name, given in sections.items()
    }
    return parse_any_recipe({**tree, **both})


def _said(before: AnyRecipe, now: AnyRecipe) -> str | None:
    found = difference(before.model_dump(mode="json"), now.model_dump(mode="json"))
    return found[0] if found else why_not_longer(before, now)


@pytest.mark.parametrize("tree", [TREE, TUNED])
def test_more_steps_and_another_micro_batch_are_taken_over(tree: dict[str, Any]) -> None:
    before = _recipe(tree)
    now = _recipe(tree, train={"steps": 20, "micro_batch_size": 4, "log_every": 3})
    assert _said(before, now) is None and longer(before, before) is None
    assert longer(before, now) == (
        "made longer: train.steps was 10, now 20; the learning rate stays at 0.0003, as "
        "train.schedule is constant"
    )
    taken = in_force(before, now).train
    assert (taken.steps, taken.micro_batch_size, taken.log_every) == (20, 4, 10)


def test_where_weights_and_states_lie_is_taken_over() -> None:
    """Also where one of both recipes says nothing of it."""
    offloaded = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "overlap_comm": True}
    }
    before = _recipe()
    now = _recipe(
        teacher={"placement": "shard"}, train={"zero_stage": 3}, deepspeed={**offloaded, "bf16": {}}
    )
    assert _said(before, now) is None and _said(now, before) is None
    taken = in_force(before, now)
    assert isinstance(taken, Recipe)
    assert (taken.teacher.placement, taken.train.zero_stage) == ("shard", 3)
    assert taken.deepspeed == now.deepspeed and in_force(now, before) == before
    # what sharded weights can't have, and graphs on several GPUs
    alone = _recipe(train={"compile": True, "cuda_graph": True})
    assert _said(alone, now) is None and in_force(alone, now) == now
    # and so is whether they are measured
    profiled = _recipe(train={"profile": True})
    assert _said(_recipe(), profiled) is None and in_force(_recipe(), profiled) == profiled


@pytest.mark.parametrize(
    "section",
    [{"zero_optimization": {"zero_quantized_weights": True}}, {"prescale_gradients": True}],
)
def test_a_key_of_deepspeed_that_changes_numbers_may_not_differ(section: dict[str, Any]) -> None:
    key = _said(_recipe(), _recipe(deepspeed=section))
    assert key is not None and key.startswith("deepspeed.")


def test_epochs_grow_like_steps() -> None:
    before, now = (_recipe(train={"steps": 0, "epochs": n}) for n in (1, 2.5))
    assert _said(before, now) is None
    assert "train.epochs was 1, now 2.5" in (longer(before, now) or "")


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fewer": ({}, {"train": {"steps": 5}}, "a run can only be made longer"),
    "another unit": ({}, {"train": {"steps": 0, "epochs": 9}}, "in the same unit"),
    "linear": (
        {"train": {"schedule": "linear"}},
        {"train": {"schedule": "linear", "steps": 20}},
        "with train.schedule linear the learning rates of the steps that were made depend on it",
    ),
    "cosine": (
        {"train": {"schedule": "cosine"}},
        {"train": {"schedule": "cosine", "steps": 20}},
        "with train.schedule cosine",
    ),
    "a share": (
        {"train": {"warmup_share": 0.1}},
        {"train": {"warmup_share": 0.1, "steps": 20}},
        "train.warmup_share is 0.1, a share of all steps; go on from its student in another run, "
        "with student.init",
    ),
    "a weight that moves": (
        {"losses": {"hidden": {"schedule": {}}}},
        {"losses": {"hidden": {"schedule": {}}}, "train": {"steps": 20}},
        "losses.hidden.schedule is stretched over all steps",
    ),
    "another schedule": ({"train": {"schedule": "linear"}}, {}, "train.schedule"),
    "another batch": ({}, {"train": {"batch_size": 8}}, "train.batch_size"),
    "another stage": ({"stages": [{}]}, {"stages": [{}, {}]}, "stages"),
    "a field of a stage": (
        {"stages": [{}, {"train": {"seed": 1}}]},
        {"stages": [{}, {"train": {"seed": 2}}]},
        "stages.2.train.seed",
    ),
    "the first stage": (
        {"stages": [{"train": {"steps": 3}}, {}]},
        {"stages": [{"train": {"steps": 4}}, {}]},
        "stages.1.train.steps=3, now 4 is given, but only the last stage can be made longer",
    ),
    "all stages": (
        {"stages": [{}, {}]},
        {"stages": [{}, {}], "train": {"steps": 20}},
        "stages.1.train.steps=10, now 20",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_end_otherwise_is_refused(case: str) -> None:
    before, now, said = REFUSED[case]
    assert said in (_said(_recipe(**before), _recipe(**now)) or "")


def test_a_fine_tuning_run_warms_up_over_a_share_unless_told_otherwise() -> None:
    train = {"schedule": "constant", "steps": 10}
    before, now = (_recipe({**TUNED, "train": {**train, "steps": steps}}) for steps in (10, 20))
    said = "train.warmup_share is 0.1, a share of all steps; go on from its student in another run"
    assert f"{said}, with model" in (_said(before, now) or "")


def test_the_last_stage_grows() -> None:
    stages = [{"train": {"steps": 3}}, {"train": {"steps": 3, "seed": 4}}]
    grown = [{"train": {"steps": 3, "micro_batch_size": 2}}, {"train": {"steps": 6, "seed": 4}}]
    before, now = _recipe(stages=stages), _recipe(stages=grown)
    assert _said(before, now) is None
    assert "train.steps was 3, now 6" in (longer(before, now) or "")
    assert in_force(before, now) == now


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("longer"), train=CONSTANT)


@pytest.fixture(scope="module")
def runs(recipe: Path) -> dict[str, Path]:
    """Runs of four steps made longer, and one that had eight at once."""
    found = {name: recipe.parent / name for name in ("longer", "cut", "whole")}
    dropout = {"student.dropout": 0.1}
    variants = [
        {"run.output": str(found["longer"]), "train.steps": 4, **dropout},
        {"run.output": str(found["longer"]), "train.steps": 8, **dropout},
        {"run.output": str(found["whole"]), "train.steps": 8, **dropout},
        {"run.output": str(found["cut"]), "train.steps": 4},
        {"run.output": str(found["cut"]), "train.steps": 8, "train.micro_batch_size": 2},
        {"run.output": str(found["whole"]) + "-2", "train.steps": 8},
    ]
    said = run_variants(recipe, [keys(variant) for variant in variants])
    assert said.count("made longer: train.steps was 4, now 8; the learning rate stays at") == 2
    return found


def test_a_longer_run_ends_as_if_it_had_been_that_long(runs: dict[str, Path]) -> None:
    mine, theirs = read_weights(runs["longer"]), read_weights(runs["whole"])
    assert all(weight.equal(theirs[name]) for name, weight in mine.items())
    assert read_losses(runs["longer"]) == read_losses(runs["whole"])
    one, other = summary_of(runs["longer"]), summary_of(runs["whole"])
    assert (one["steps"], one["after"]) == (8, other["after"])
    assert yaml.safe_load((runs["longer"] / "recipe.yaml").read_text())["train"]["steps"] == 8


def test_another_micro_batch_ends_in_the_same_student(runs: dict[str, Path]) -> None:
    whole = runs["whole"].with_name("whole-2")
    assert_same_run(runs["cut"], whole, losses=1e-5, weights=1e-5)
    assert (
        yaml.safe_load((runs["cut"] / "recipe.yaml").read_text())["train"]
        | {
            "steps": 8,
            "micro_batch_size": 2,
        }
        == (yaml.safe_load((runs["cut"] / "recipe.yaml").read_text())["train"])
    )


def test_a_finished_run_without_checkpoints_stays_finished(
    recipe: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs["cut"], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    more = keys({"run.output": str(run), "train.steps": 9, "train.micro_batch_size": 2})
    done = run_command("distill", str(recipe), *more, "--resume")
    assert done.returncode == 2
    assert "is finished and its checkpoints are gone" in done.stderr.strip().splitlines()[-1]
    assert summary_of(run)["steps"] == 8
    assert json.loads((run / "summary.json").read_text()) == summary_of(runs["cut"])


def test_a_decaying_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(_recipe(train={"schedule": "linear"}))
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(UserError, match=r"run was started with train.steps=10, now 20 .* linear"):
        run.check(_recipe(train={"schedule": "linear", "steps": 20}), resume=True)
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_the_last_stage_is_made_longer(recipe: Path) -> None:
    run, whole = recipe.parent / "staged", recipe.parent / "staged-whole"
    short, long = ([{"train": {"steps": 2}}, {"train": {"steps": n}}] for n in (2, 4))
    variants: list[dict[str, Any]] = [
        {"run.output": str(run), "stages": short},
        {"run.output": str(run), "stages": long},
        {"run.output": str(whole), "stages": long},
        {"run.output": str(run), "stages": long},
    ]
    said = run_variants(recipe, [keys(variant) for variant in variants])
    _assert_longer(run, whole, said)
    assert summary_of(run)["steps"] == 6


def test_a_run_whose_last_stage_is_being_made_longer_is_not_finished(tmp_path: Path) -> None:
    recipe, run = make_recipe(tmp_path, train=CONSTANT), tmp_path / "run"
    short, long = ({"stages": [{"train": {"steps": n}} for n in (2, last)]} for last in (2, 4))
    fastkd.distill(recipe, short, quiet=True)
    # killed at the first step of those that are more
    with pytest.raises(ZeroDivisionError):
        fastkd.distill(recipe, long, resume=True, quiet=True, on_step=lambda step, _: 1 // 0)
    assert not (run / "summary.json").exists()
    with pytest.raises(
        UserError, match=r"run was started with stages\.2\.train\.steps=4, now 2 is"
    ):
        fastkd.distill(recipe, short, resume=True, quiet=True)
    with pytest.raises(UserError, match="holds no finished run"):
        fastkd.evaluate(run, quiet=True)
    assert fastkd.distill(recipe, long, resume=True, quiet=True).summary["steps"] == 6


def test_time_and_memory_are_those_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, train=CONSTANT)
    ticks = itertools.count()
    # every look at the clock is a second later, and the first process needs the most memory
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    peaks = {"process": 8_000_000_000}
    monkeypatch.setattr(cost, "peak_memory", lambda ranks: peaks["process"])
    first = fastkd.distill(recipe, {"train.steps": 2}, quiet=True).summary
    peaks["process"] = 5_000_000_000
    looked = next(ticks) + 1
    more = fastkd.distill(recipe, {"train.steps": 3}, quiet=True, resume=True).summary
    # until the checkpoint of the last step, and what came after that was gone on from
    assert more["seconds"] == (first["seconds"] - 1) + (next(ticks) - 1 - looked)
    assert more["peak_memory_bytes"] == first["peak_memory_bytes"] == 8_000_000_000
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    gpu = cost.Cost(Ranks(0, 1, torch.device("cuda")))
    # what this process did before is none of its cost
    assert reset == [torch.device("cuda")]
    gpu.load({"seconds": 2.0, "peak": 8_000_000_000, "peak_of": "process"})
    assert (gpu.peak, gpu.peak_of) == (5_000_000_000, "GPU")


def test_the_teacher_of_a_lean_run_is_judged_once_there_is_an_evaluation(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier")
    train = {"steps": 6, "checkpoint_every": 1}
    recipe = write_recipe(tmp_path, "run", train=train, run={"lean": True})
    with pytest.raises(ZeroDivisionError):
        fastkd.distill(recipe, quiet=True, on_step=lambda step, _: 1 // (4 - step))
    # the evaluation that would have been the first is over
    given = {"train.evaluate_every": 2}
    done = fastkd.distill(recipe, given, quiet=True, resume=True)
    lines = RunFolder(done.folder).read_metrics()
    assert [x["step"] for x in lines if x["kind"] == "teacher"] == [4]
    assert [x["step"] for x in lines if x["kind"] == "heldout"] == [4, 6]
    assert done.summary["teacher"]["score"] == fastkd.evaluate(done, quiet=True).teacher["score"]


def test_a_tuned_model_is_made_longer(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_encoder(tmp_path / "encoder")
    recipe = write_recipe(tmp_path, "tuned", train={"schedule": "constant", "warmup_share": 0})
    run, whole = tmp_path / "tuned", tmp_path / "whole"
    variants: list[dict[str, Any]] = [
        {"train.steps": 2},
        {"train.steps": 4},
        {"train.steps": 4, "run.output": str(whole)},
        {"train.steps": 4},
    ]
    said = run_variants(recipe, [keys(variant) for variant in variants])
    _assert_longer(run, whole, said)


def _assert_longer(run: Path, whole: Path, said: str) -> None:
    assert said.count("made longer") == 1
    assert f"{run} is finished" in said.replace("\n", " ")
    one, other = summary_of(run), summary_of(whole)
    assert (one["steps"], one["after"]) == (other["steps"], other["after"])
    mine, theirs = (load_file(path / "student" / "model.safetensors") for path in (run, whole))
    assert all(weight.equal(theirs[name]) for name, weight in mine.items())
