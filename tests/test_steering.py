"""Evaluations that end a run and choose its student: on every rank alike, also when resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import make_recipe, read_weights, run_command
from tiny_training import save_classifier, save_encoder, summary_of, write_recipe, write_task

import fastkd
from fastkd.recipe.train import EarlyStopping
from fastkd.training import steering
from fastkd.training.steering import Best, Steering

# becomes better for some steps, then worse
TRAIN = {
    **{"steps": 8, "batch_size": 6, "warmup_steps": 0, "schedule": "constant"},
    **{"learning_rate": 4e-2, "evaluate_every": 1, "log_every": 5, "checkpoint_every": 2},
}
STOPPING = {"metric": "perplexity", "patience": 3}
STEERED = {"train.early_stopping": STOPPING, "run.keep_best": "perplexity"}


@pytest.mark.parametrize("larger", [False, True])
def test_the_best_is_better_by_the_least_change(larger: bool) -> None:
    best = Best("total", larger, least=0.5)
    sign = 1 if larger else -1
    values = [1.0, 1.4, 1.6, 1.5, 2.1, 2.2, 0.0]
    seen = [best.observe(step, sign * value) for step, value in enumerate(values, start=1)]
    assert seen == [True, False, True, False, False, True, False]
    assert (best.step, best.value, best.waited) == (6, sign * 2.2, 1)
    again = Best("total", larger, least=0.5)
    again.load(best.state())
    assert again == best


def test_a_run_stops_by_the_least_change_of_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "metric_directions", lambda run: {"total": False})
    stopping = EarlyStopping(metric="total", patience=2, minimum_change=0.5)
    train, kept = SimpleNamespace(early_stopping=stopping), SimpleNamespace(keep_best="total")
    run: Any = SimpleNamespace(recipe=SimpleNamespace(train=train, run=kept))
    made = Steering(run)
    assert made._stopping == Best("total", larger=False, least=0.5)
    assert made._best == Best("total", larger=False), "the best is kept, by however little"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steered")
    rows = [f"w{n} w{9 + n % 5}\tw{7 + n % 3} w30 w{n}\t{n * n % 7}" for n in range(5, 18)]
    (folder / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    pairs = {"pairs": {"few": str(folder / "pairs.tsv")}}
    return make_recipe(folder, "gpt2", student={"head": "causal_lm"}, train=TRAIN, evaluate=pairs)


@pytest.fixture(scope="module")
def steered(recipe: Path) -> fastkd.RunResult:
    return fastkd.distill(recipe, STEERED, quiet=True, **{"run.output": recipe.parent / "steered"})


def heldout(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: x["heldout/perplexity"] for x in lines if x["kind"] == "heldout"}


def test_a_run_stops_and_hands_on_its_best_student(steered: fastkd.RunResult, recipe: Path) -> None:
    found, summary = heldout(steered.folder), steered.summary
    del found[0]
    best = min(found, key=lambda step: found[step])
    assert summary["exported_step"] == best
    assert summary["steps"] == max(found) == best + 3 < 8
    assert summary["stopped_early"]
    assert summary["kept_best"] == {"metric": "perplexity", "value": found[best]}
    assert summary["after"]["perplexity"] == found[best]
    assert summary["train_tokens"] == summary["steps"] * 6 * 16
    # and it is the student of that step, not of another
    again = fastkd.evaluate(steered, quiet=True).judged["perplexity"]
    assert again == pytest.approx(found[best], rel=1e-6)
    assert found[max(found)] > found[best] * 1.01
    short = fastkd.distill(
        recipe, {"train.steps": best, "run.output": recipe.parent / "short"}, quiet=True
    )
    expected, weights = read_weights(short.folder), read_weights(steered.folder)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    page = (steered.folder / "report.html").read_text()
    assert f"the student of step {best}, whose perplexity is the best" in page
    assert "stopped early" in page


def test_an_interrupted_run_comes_to_the_same_end(steered: fastkd.RunResult, recipe: Path) -> None:
    output = {"run.output": recipe.parent / "stopped"}

    def stop(step: int, _found: fastkd.Evaluation) -> None:
        # the best student is older than the last checkpoint
        if step == 5:
            raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        fastkd.distill(recipe, {**STEERED, **output}, quiet=True, on_evaluate=stop)
    again = fastkd.distill(recipe, {**STEERED, **output}, quiet=True, resume=True)
    for key in ("exported_step", "steps", "kept_best", "after", "stopped_early"):
        assert again.summary[key] == steered.summary[key], key
    expected, found = read_weights(steered.folder), read_weights(again.folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # also one that is over stays so where it may be longer
    longer = {**STEERED, **output, "train.steps": 20}
    more = fastkd.distill(recipe, longer, quiet=True, resume=True)
    assert more.summary["steps"] == steered.summary["steps"] and more.summary["stopped_early"]
    found = read_weights(more.folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sharded_ranks_decide_and_measure_alike(steered: fastkd.RunResult, recipe: Path) -> None:
    output = recipe.parent / "ranks"
    given = [f"{key}={json.dumps(value)}" for key, value in STEERED.items()]
    persist = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    done = run_command(
        "distill",
        *(str(recipe), *given, f"run.output={output}", "train.zero_stage=3", persist),
        *("teacher.placement=shard", "train.micro_batch_size=3"),
        ranks=2,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = summary_of(output)
    assert f"stopped after step {summary['steps']}: no better perplexity than" in done.stdout
    for key in ("exported_step", "steps", "stopped_early"):
        assert summary[key] == steered.summary[key], key
    assert summary["after"]["total"] == pytest.approx(steered.summary["after"]["total"], rel=1e-3)
    for key in ("before", "after", "teacher"):
        expected = steered.summary[key]["perplexity"]
        assert summary[key]["perplexity"] == pytest.approx(expected, rel=1e-3), key
    for key in ("before", "teacher"):
        expected = steered.summary[key]["pairs"]["few"]
        assert summary[key]["pairs"]["few"] == pytest.approx(expected, abs=1e-6), key
    found = fastkd.evaluate(output, quiet=True)
    assert found.total == pytest.approx(summary["after"]["total"], rel=1e-5)


def test_a_score_is_better_where_it_is_larger(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_encoder(tmp_path / "encoder")
    # from a good start to a rate that ruins it
    train = {"steps": 14, "evaluate_every": 2, "learning_rate": 4e-3, "schedule": "constant"}
    path = write_recipe(tmp_path, "tuned", train=train)
    result = fastkd.finetune(path, {"run.keep_best": "score"}, quiet=True)
    lines = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
    scores = {x["step"]: x["heldout/score"] for x in lines if x["kind"] == "heldout" and x["step"]}
    best = max(scores.values())
    assert result.summary["exported_step"] == min(s for s, v in scores.items() if v == best)
    assert fastkd.evaluate(result, quiet=True).judged["score"] == best > scores[14] - 1e-9


def refusal(recipe: Path, overrides: dict[str, Any], **keywords: Any) -> str:
    with pytest.raises(fastkd.UserError) as refused:
        fastkd.distill(recipe, overrides, quiet=True, **keywords)
    return str(refused.value)


def test_what_can_not_decide_is_refused_before_anything_is_written(recipe: Path) -> None:
    output = {"run.output": recipe.parent / "refused"}
    said = refusal(recipe, {**output, "run.keep_best": "hidden/1-1"})
    assert "run.keep_best is 'hidden/1-1', which no evaluation of this run finds; did you" in said
    assert "expected one of attention/1-2" in said
    said = refusal(recipe, {**output, "train.early_stopping": {**STOPPING, "metric": "score"}})
    assert said.startswith("train.early_stopping.metric is 'score', which no evaluation")
    # the student is narrower, and nothing takes its embeddings to the teacher's
    alone = {"losses": {"attention": {}}, "run.keep_best": "sentence_cosine"}
    assert "'sentence_cosine', which no evaluation" in refusal(recipe, {**output, **alone})
    said = refusal(recipe, {**output, "run.keep_best": "total", "train.evaluate_every": 0})
    assert "run.keep_best is given, but train.evaluate_every is 0" in said
    said = refusal(recipe, {**output, "train.early_stopping": {"metric": "total"}})
    assert "train.early_stopping.patience: missing" in said
    assert not Path(output["run.output"]).exists()


def test_a_run_goes_on_under_the_evaluations_that_it_began_with(
    steered: fastkd.RunResult, recipe: Path
) -> None:
    same = {**STEERED, "run.output": steered.folder}
    for changes, said in (
        ({"train.evaluate_every": 3}, "train.evaluate_every=1, now 3"),
        ({"run.keep_best": None}, "run.keep_best='perplexity', now None"),
        ({"train.early_stopping": {**STOPPING, "patience": 2}}, "patience=3, now 2"),
    ):
        assert said in refusal(recipe, {**same, **changes}, resume=True)


# by step; those of 10 and 13 are of no schedule: the best of all, and one more that is no better
VALUES = {0: 9.0, 3: 5.0, 6: 4.0, 9: 3.0, 10: 1.0, 12: 6.0, 13: 7.0, 15: 8.0}


def test_a_longer_run_decides_as_if_it_had_been_that_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation of a last step that is none of the schedule decides nothing of a longer run:
    neither its student nor its end, nor the predictions that are kept."""
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier")
    stopping = {"metric": "total", "patience": 2}
    train = {**TRAIN, "evaluate_every": 3, "early_stopping": stopping}
    kept = {"keep_best": "total", "predictions": True}
    recipe = write_recipe(tmp_path, "run", train=train, run=kept)
    observe, at = Steering.observe, [0]

    def observed(one: Steering, step: int, evaluation: fastkd.Evaluation) -> None:
        at[0] = step
        observe(one, step, evaluation)

    monkeypatch.setattr(Steering, "observe", observed)
    monkeypatch.setattr(steering, "metric_value", lambda evaluation, name: VALUES[at[0]])

    def run(name: str, steps: int, **given: Any) -> fastkd.RunResult:
        overrides = {"run.output": str(tmp_path / name), "train.steps": steps}
        return fastkd.distill(recipe, overrides, quiet=True, **given)

    whole = run("whole", 15)
    assert (whole.summary["exported_step"], whole.summary["steps"]) == (9, 15)
    for short, exported in ((10, 10), (13, 9)):
        # a run that ends there has that evaluation
        assert run(f"{short}", short).summary["exported_step"] == exported
        found = run(f"{short}", 15, resume=True)
        for key in ("exported_step", "steps", "kept_best", "after", "stopped_early"):
            assert found.summary[key] == whole.summary[key], (short, key)
        expected, weights = read_weights(whole.folder), read_weights(found.folder)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        one, other = (np.load(each.folder / "predictions.npz") for each in (whole, found))
        assert all(np.array_equal(one[name], other[name]) for name in one.files)
