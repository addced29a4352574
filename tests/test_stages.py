"""Stages are all checked before the first one trains, and nothing is claimed before that."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from test_recipe import refusal, tree
from tiny_training import (
    fastkd,
    run_whole,
    save_classifier,
    save_encoder,
    summary_of,
    write_recipe,
    write_task,
)

from fastkd.losses.objective import Objective
from fastkd.recipe import Train
from fastkd.recipe.stages import stage_trees
from fastkd.training.run_folder import RunFolder
from fastkd.training.stages import join_summaries

FIRST = {"losses": {"hidden": {}}, "train": {"steps": 1}}
LATER: dict[str, tuple[dict[str, Any], str]] = {
    "a layer that the teacher lacks": (
        {"losses": {"hidden": {}}, "layer_map": [9, 9]},
        "stages.2: layer_map sends student layer 1 to teacher layer 9",
    ),
    "a task that isn't there": ({"task": {"source": "/nowhere"}}, "stages.2: /nowhere: no folder"),
    "labels of another number": ({"task": {"labels": ["a", "b", "c"]}}, "stages.2: teacher.model"),
    "more tokens than positions": ({"task": {"max_length": 100}}, "stages.2: Bert"),
    # the op compares raw logits, and the recipe doesn't know
    "a loss that the op refuses": (
        {"losses": {"logits": {"kind": "mse", "temperature": 2.0}}},
        "stages.2: losses",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_task(tmp_path / "task")
    save_encoder(tmp_path / "encoder")
    save_classifier(tmp_path / "classifier")
    return tmp_path


def test_a_stage_is_no_deeper_than_other_sections() -> None:
    """From Python, where no YAML bounds it: pydantic writes 255 levels and no more."""
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    expected = r"^stages\.0: more than 20 sections inside each other"
    assert re.search(expected, refusal(tree(stages=[{"train": {"steps": 3}, "task": {"x": deep}}])))


def test_stages_draw_apart_unless_they_say_how() -> None:
    tree: dict[str, Any] = {
        "train": {"seed": 3, "dropout_seed": 5},
        "student": {"layers": 2},
        "run": {"output": "runs/x"},
        "stages": [{}, {}, {"train": {"order_seed": 8}}, {"train": {"seed": 9}}],
    }
    found = [Train.model_validate(made["train"]) for made in stage_trees(tree)]
    assert (found[0].order, found[0].dropping) == (3, 5)
    assert found[2].order == 8
    # what a stage says of itself holds, what all share is drawn anew
    assert found[3].order == 9 and found[3].dropping == 5
    assert len({train.order for train in found}) == 4
    assert len({train.dropping for train in found[:3]}) == 3
    assert stage_trees(tree) == stage_trees(tree)
    # refused where the recipe is read
    for nonsense in (None, "fast", 3):
        assert stage_trees({**tree, "stages": [{}, {"train": nonsense}]})[1]["train"] == nonsense


@pytest.mark.parametrize("name", LATER)
def test_a_later_stage_is_refused_before_the_first_one_trains(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stage, expected = LATER[name]
    recipe = write_recipe(folder, "staged", losses={"hidden": {}}, stages=[FIRST, stage])
    assert fastkd("distill", str(recipe), monkeypatch=monkeypatch) == 2
    (said,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("fastkd: ")]
    assert expected in said
    assert not (folder / "staged").exists()


def test_an_op_that_refuses_is_one_line_and_claims_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever an op says, of a run without stages too."""

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("student[0] is odd;\n expected even")

    monkeypatch.setattr(Objective, "forward", refuse)
    recipe = write_recipe(folder, "run")
    assert fastkd("distill", str(recipe), monkeypatch=monkeypatch) == 2
    assert "fastkd: losses: student[0] is odd; expected even" in capfd.readouterr().err
    assert not (folder / "run").exists()


def test_a_wrong_source_leaves_the_folder_to_the_corrected_recipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [FIRST, {"losses": {"logits": {}}, "train": {"steps": 1}}]
    recipe = write_recipe(folder, "staged", losses={"hidden": {}}, stages=stages)
    wrong = "task.source=/nowhere"
    assert fastkd("distill", str(recipe), wrong, monkeypatch=monkeypatch) == 2
    assert not (folder / "staged").exists()
    umask = os.umask(0o027)
    try:
        said = run_whole("distill", recipe)
    finally:
        os.umask(umask)
    assert said.index("checking stage 2 of 2") < said.index("stage 1 of 2")
    assert summary_of(folder / "staged")["steps"] == 2
    run = folder / "staged"
    files = [path for path in run.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert {run / "student" / "model.safetensors", run / "summary.json"} <= set(files)
    # whoever may read the folder may read the student
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]


def judged_stage(before: dict[str, Any], after: dict[str, Any], data: str = "a") -> dict[str, Any]:
    """What of a stage's summary says whether a run ended worse than it began."""
    sides = {"before": {"total": 1.0, **before}, "after": {"total": 0.5, **after}}
    return {**sides, "worse": [], "data_digests": {"train": data}} | {
        "steps": 1,
        "seconds": 1.0,
        "peak_memory_bytes": 1,
        "peak_memory_of": "process",
    }


SETS = {"dev": {"accuracy": 0.5}}


@pytest.mark.parametrize(
    ("first", "last", "data", "expected"),
    [
        # lost between the stages, so worse than no stage found it
        (
            {"sentence_cosine": 0.1150, "pairs": {"sts": 0.5}},
            {"sentence_cosine": -0.1539, "pairs": {"sts": 0.25}},
            "a",
            ["sentence cosine -0.1539, before 0.1150", "sts 0.2500, before 0.5000"],
        ),
        (
            {"score": 0.5, "scores": SETS},
            {"score": 0.25, "scores": SETS},
            "a",
            ["score 0.2500, bef"],
        ),
        # what means something else in another stage
        ({"score": 0.5, "scores": SETS}, {"score": 0.25, "scores": {"x": {"f1": 1}}}, "a", []),
        ({"sentence_cosine": 0.5}, {"sentence_cosine": 0.25}, "b", []),
        ({"total": 0.1, "pseudo_perplexity": 2.0}, {"pseudo_perplexity": 3.0}, "a", []),
        ({"sentence_cosine": 0.25}, {"sentence_cosine": 0.5}, "a", []),
        ({"sentence_cosine": 0.25}, {"sentence_cosine": None}, "a", []),
    ],
)
def test_the_end_of_the_last_stage_is_held_against_the_first(
    first: dict[str, Any], last: dict[str, Any], data: str, expected: list[str]
) -> None:
    stages = [judged_stage(first, {}), judged_stage({}, last, data)]
    found = join_summaries(RunFolder(Path("run")), stages)["worse"]
    assert len(found) == len(expected)
    for said, one in zip(found, expected, strict=True):
        assert said.startswith(f"stages 1 to 2: {one}")
