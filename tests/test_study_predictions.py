"""Tables of a study from predictions that were kept: shares of the teacher, and what is tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from numpy.typing import NDArray
from study_files import MAPPINGS, write_study

from fastkd.errors import UserError
from fastkd.study import load_study
from fastkd.study.plan import Plan, Run
from fastkd.study.plots import make_plots
from fastkd.study.results import Results
from fastkd.study.storage import Record
from fastkd.study.tables import Table, make_tables

EXAMPLES, SEEDS = 120, 7
LABELS = (np.arange(EXAMPLES) % 10 >= 6).astype(np.int64)
# shares of the examples that are answered rightly
TEACHER = {"good": 0.9, "poor": 0.62}
STUDENT = {"uniform": 0.85, "last": 0.75, "again": 0.845, None: 0.7}
FLOOR = 0.6


def logits(share: float, rng: np.random.Generator, of: str = "") -> NDArray[np.float32]:
    """Outputs of two classes, the right one larger for so many examples, mostly the same ones."""
    hard = np.random.default_rng([*of.encode()]).permutation(EXAMPLES)
    order = np.argsort(np.argsort(hard + rng.normal(0, 10, EXAMPLES)))
    wrong = order >= round(share * EXAMPLES)
    said = np.where(wrong, 1 - LABELS, LABELS)
    return np.eye(2, dtype=np.float32)[said]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    task = {"labels": ["0", "1"], "columns": {"texts": "a", "label": "b"}, "source": "nowhere"}
    path = write_study(
        tmp_path,
        tasks={name: {"task": {**task, "name": name}} for name in TEACHER},
        axes={"mapping": {**MAPPINGS, "again": {"layer_map": "mean_loss"}}},
        controls={"alone": {"losses.hidden.weight": 0.5}},
        hypotheses=[
            {"axis": "mapping", "level": "last"},
            {"axis": "mapping", "level": "again", "margin": 0.3},
            {"axis": "mapping", "level": "uniform", "against": "alone"},
            {"axis": "mapping", "level": "again", "against": "last", "margin": 0.1},
        ],
        seeds=SEEDS,
    )
    return Plan(load_study(path), path)


def kept(plan: Plan) -> list[Record]:
    """Every run of a study, with its predictions."""
    records = []
    for condition in plan.conditions:
        for run in plan.runs(condition):
            assert run.task is not None
            rng = np.random.default_rng([run.seed, *run.key.encode()])
            level = condition.levels.get("mapping")
            outputs = logits(STUDENT[level] + rng.uniform(-0.02, 0.02), rng, str(level))
            folder = plan.place(run).run
            folder.mkdir(parents=True)
            teacher = logits(TEACHER[run.task], np.random.default_rng(0))
            arrays = {"outputs": outputs, "labels": LABELS, "teacher": teacher}
            np.savez_compressed(
                folder / "predictions.npz", **{f"dev/{name}": a for name, a in arrays.items()}
            )
            score = float((outputs.argmax(axis=1) == LABELS).mean())
            records.append(Record(run, "finished", score, 1.0))
    return records


def tables(plan: Plan, records: list[Record]) -> dict[str, Table]:
    return {table.name: table for table in make_tables(Results(plan, records), {})}


def of(table: Table, column: str, name: str) -> dict[str, Any]:
    return next(row for row in table.numbers if row[column] == name)


def test_scores_are_read_between_one_answer_and_the_teacher(plan: Plan) -> None:
    records = kept(plan)
    found = tables(plan, records)
    whole, good = found["axis-mapping"], found["axis-mapping-good"]
    assert whole.columns == (
        *("mapping", "good", "poor", "of the teacher", "seeds", "less baseline"),
    )
    assert [row[0] for row in whole.rows] == [
        *("one answer", "teacher", "alone (control)", "uniform (baseline)", "last", "again"),
    ]
    assert whole.rows[0][1:3] == ("0.600", "0.600")
    assert of(whole, "mapping", "teacher")["good mean"] == pytest.approx(0.9)
    # the poor teacher is above 0.6 by less than two standard errors
    assert "poor: the teacher is not above one answer" in " ".join(whole.notes)
    assert "kept mean" not in of(found["axis-mapping-poor"], "mapping", "last")
    assert [row[0] for row in found["axis-mapping-poor"].rows[:2]] == ["one answer", "teacher"]
    scores = [r.value for r in records if r.run.key.startswith("good/mapping=last/")]
    share = (np.mean(scores) - FLOOR) / (0.9 - FLOOR)
    for table in (whole, good):
        assert of(table, "mapping", "last")["kept mean"] == pytest.approx(share)
    base = [r.value for r in records if r.run.key.startswith("good/mapping=uniform/")]
    gap = np.mean(scores) - np.mean(base)
    # of one task a difference is in its score, of several in the share
    assert of(good, "mapping", "last")["difference mean"] == pytest.approx(gap)
    assert of(whole, "mapping", "last")["difference mean"] == pytest.approx(gap / 0.3)


def test_all_tasks_are_drawn_as_they_are_compared(plan: Plan) -> None:
    results = Results(plan, kept(plan))
    row = next(row for row in results.axis("mapping") if row.level == "last")
    assert row.kept is not None
    figure = make_plots(results, {})["axis-mapping"]
    first, *_, panel = figure.axes
    assert panel.get_title() == "of the teacher, with 95 % intervals"
    # no score, and its bars are no deviation
    assert panel.get_ylabel() == "share kept of the teacher" != first.get_ylabel()
    assert panel.get_legend_handles_labels()[1][-1] == "mean with its 95 % interval"
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"mean ± standard deviation", "mean with its 95 % interval"} <= set(said)
    (bars,) = panel.containers
    assert isinstance(bars, ErrorbarContainer)
    points, _, (ends,) = bars.lines
    place = [label.get_text() for label in panel.get_xticklabels()].index("last")
    assert np.asarray(points.get_ydata())[place] == pytest.approx(row.kept.mean)
    assert ends.get_segments()[place][:, 1] == pytest.approx(row.kept.interval())


def test_examples_make_intervals_wider_than_seeds_alone(plan: Plan) -> None:
    records = kept(plan)
    wide = of(tables(plan, records)["axis-mapping-good"], "mapping", "last")
    for record in records:
        (plan.place(record.run).run / "predictions.npz").unlink()
    narrow = of(tables(plan, records)["axis-mapping-good"], "mapping", "last")
    assert narrow["difference mean"] == pytest.approx(wide["difference mean"])
    assert narrow["difference freedom"] == SEEDS - 1 < wide["difference freedom"]
    assert narrow["difference error"] < wide["difference error"]
    # nothing says what the scores are read between
    assert "kept mean" not in narrow and wide["kept mean"]


def test_hypotheses_are_answered_and_nothing_else_is_tested(plan: Plan) -> None:
    found = tables(plan, kept(plan))
    table = found.pop("hypotheses")
    answers = {row[:3]: row[-1] for row in table.rows}
    assert answers == {
        ("mapping: last", "uniform", "differ"): "open",
        ("mapping: again", "uniform", "by less than 0.3"): "yes",
        ("mapping: uniform", "alone", "differ"): "yes",
        ("mapping: again", "last", "by less than 0.1"): "open",
    }
    ps = [row["p"] for row in table.numbers]
    # of 7 seeds 2 / 128 is the smallest, and after one of a margin three times that an answer
    assert ps[2] == pytest.approx(2 / 128) and ps[0] > 2 / 128
    assert table.numbers[2]["p corrected"] == pytest.approx(3 * 2 / 128)
    assert table.numbers[2]["improvement"] == 1.0 and ps[3] > 0.5
    for other in found.values():
        assert not any("p" in row or "p corrected" in row for row in other.numbers)


def test_an_answer_waits_for_all_seeds(plan: Plan) -> None:
    """All that are planned, of both conditions: a look after every seed finds what is not there."""
    whole = kept(plan)

    def table(missing: str) -> Table:
        left = [Record(r.run, "waiting") if missing in r.run.key else r for r in whole]
        return tables(plan, left)["hypotheses"]

    found = table("/seed-6")
    assert [row[-1] for row in found.rows] == ["not yet"] * 4
    assert all(row["p"] is row["p corrected"] is None for row in found.numbers)
    # what is known of them stays
    assert all(row["difference seeds"] == 6 and row["improvement"] >= 0 for row in found.numbers)
    assert "with all 7 seeds of both conditions" in found.notes[1]
    # what is open counts as the largest p of those that are corrected together
    found = table("good/alone/seed-6")
    assert [row[-1] for row in found.rows] == ["open", "yes", "not yet", "open"]
    assert len(table("/seed-7").notes) == 1


def test_summaries_say_what_scores_are_read_between_where_nothing_is_kept(plan: Plan) -> None:
    records = kept(plan)
    for record in records:
        folder = plan.place(record.run).run
        (folder / "predictions.npz").unlink()
        teacher = TEACHER[str(record.run.task)]
        after = f'{{"score": {record.value}, "baseline": {{"score": {FLOOR}}}}}'
        (folder / "summary.json").write_text(
            f'{{"after": {after}, "teacher": {{"score": {teacher}}}}}'
        )
    found = of(tables(plan, records)["axis-mapping"], "mapping", "last")
    # without examples there is no standard error to be above
    scores = [
        (r.value - FLOOR) / (TEACHER[str(r.run.task)] - FLOOR)
        for r in records
        if r.value is not None and "mapping=last/" in r.run.key
    ]
    assert found["kept mean"] == pytest.approx(np.mean(scores))
    assert found["kept seeds"] == SEEDS


@pytest.mark.parametrize("control", ["small", "large"])
def test_conditions_with_teachers_of_their_own_are_compared_in_scores(
    tmp_path: Path, control: str
) -> None:
    taught = {"small": 0.7, "large": 0.9}
    levels = {name: {"teacher.model": name} for name in taught}
    path = write_study(
        tmp_path,
        tasks={name: {"task.name": name} for name in ("a", "b")},
        axes={"teacher": levels, "mapping": MAPPINGS},
        controls={"alone": {"teacher.model": control}},
        hypotheses=[{"axis": "teacher", "level": "large", "margin": 0.1}],
        seeds=3,
    )
    plan = Plan(load_study(path), path)
    records = []
    for run in plan.all_runs():
        whose = str(run.condition.levels.get("teacher", control))
        # of each teacher half of what it is above one answer
        score = FLOOR + (taught[whose] - FLOOR) / 2
        summary = {
            "after": {"score": score, "baseline": {"score": FLOOR}},
            "teacher": {"score": taught[whose]},
        }
        plan.place(run).run.mkdir(parents=True)
        (plan.place(run).run / "summary.json").write_text(json.dumps(summary))
        records.append(Record(run, "finished", score, 1.0))
    found = tables(plan, records)
    for name in ("axis-teacher", "axis-teacher-a"):
        table = found[name]
        ends = [row[:2] for row in table.rows if row[0].startswith("teacher")]
        expected = [("teacher of alone, small", "0.700"), ("teacher of large", "0.900")]
        if control == "large":
            expected = [("teacher of alone, large", "0.900"), ("teacher of small", "0.700")]
        assert ends == expected
        row = of(table, "teacher", "large")
        assert row["kept mean"] == pytest.approx(0.5) and row["all mean"] == pytest.approx(0.75)
        assert row["difference mean"] == pytest.approx(0.1)
        assert "Teachers differ between these rows" in " ".join(table.notes)
        assert "in that share" not in " ".join(table.notes)
    answer = found["hypotheses"]
    assert answer.numbers[0]["difference mean"] == pytest.approx(0.1)
    assert "teacher: teachers differ between conditions" in answer.notes[1]
    panel = make_plots(Results(plan, records), {})["axis-teacher"].axes[-1]
    assert panel.get_title() == "all tasks"


def test_the_same_teachers_beside_each_level_are_no_difference(tmp_path: Path) -> None:
    """Each mapping is averaged over both teachers, so shares compare and their row is of both."""
    taught = {"small": 0.7, "large": 0.9}
    path = write_study(
        tmp_path,
        tasks={name: {"task.name": name} for name in ("a", "b")},
        axes={"teacher": {n: {"teacher.model": n} for n in taught}, "mapping": MAPPINGS},
    )
    plan = Plan(load_study(path), path)
    records = []
    for run in plan.all_runs():
        teacher = taught[str(run.condition.levels["teacher"])]
        after = {"score": 0.65, "baseline": {"score": FLOOR}}
        plan.place(run).run.mkdir(parents=True)
        text = json.dumps({"after": after, "teacher": {"score": teacher}})
        (plan.place(run).run / "summary.json").write_text(text)
        records.append(Record(run, "finished", 0.65, 1.0))
    table = tables(plan, records)["axis-mapping"]
    assert [row[:2] for row in table.rows][:2] == [("one answer", "0.600"), ("teacher", "0.800")]
    assert "in that share" in " ".join(table.notes) and "Teachers differ" not in table.notes[1]


LENGTHS = {"long": {"task.max_length": 128}, "short": {"task.max_length": 16}}
OTHER_WAYS = {
    "the recipe": (LENGTHS, 0.9 - 1e-3),
    # of which no recipe says anything
    "the scores": (MAPPINGS, 0.75),
}


def summed(plan: Plan, scores: dict[str, tuple[float, float]]) -> list[Record]:
    """Runs whose summaries have what students and teachers score, by the level of the first axis;
    every seed's a little better."""
    records = []
    for run in plan.all_runs():
        student, teacher = scores[str(next(iter(run.condition.levels.values())))]
        after = {"score": student + 1e-3 * run.seed, "baseline": {"score": FLOOR}}
        plan.place(run).run.mkdir(parents=True)
        text = json.dumps({"after": after, "teacher": {"score": teacher}})
        (plan.place(run).run / "summary.json").write_text(text)
        records.append(Record(run, "finished", after["score"], 1.0))
    return records


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_a_teacher_that_scores_otherwise_is_another_one(tmp_path: Path, way: str) -> None:
    """Of a worse teacher a worse student may have the larger share, and be the worse one."""
    levels, taught = OTHER_WAYS[way]
    (good, worse) = levels
    path = write_study(
        tmp_path,
        tasks={name: {"task.name": name} for name in ("a", "b")},
        axes={"level": levels},
        hypotheses=[{"axis": "level", "level": worse}],
        seeds=8,
    )
    plan = Plan(load_study(path), path)
    found = tables(plan, summed(plan, {good: (0.8, 0.9), worse: (0.7, taught)}))
    table = found["axis-level"]
    assert of(table, "level", worse)["difference mean"] == pytest.approx(-0.1)
    assert found["hypotheses"].numbers[0]["difference mean"] == pytest.approx(-0.1)
    ends = [of(table, "level", f"teacher of {level}") for level in levels]
    assert [end["a mean"] for end in ends] == pytest.approx([0.9, taught])
    assert "Teachers differ between these rows" in " ".join(table.notes)


ANOTHER: dict[str, Any] = {
    "teacher.revision": "old",
    "teacher.dtype": "bfloat16",
    "task.max_length": 16,
    "task.columns.texts": "c",
}
THE_SAME: dict[str, Any] = {
    "teacher.attention": "eager",
    "task.padding": "none",
    "task.examples": 8,
    "train.batch_size": 4,
}


@pytest.mark.parametrize("field", [*ANOTHER, *THE_SAME])
def test_recipes_say_which_teacher_it_is(tmp_path: Path, field: str) -> None:
    """Before any run, so that what a margin is of does not hang on how close two score."""
    changed = (ANOTHER | THE_SAME)[field]
    path = write_study(tmp_path, axes={"level": {"plain": {}, "changed": {field: changed}}})
    plan = Plan(load_study(path), path)
    plain, other = (plan.teacher(condition, None) for condition in plan.conditions)
    assert (plain != other) == (field in ANOTHER)


def test_the_same_teacher_of_other_batches_is_the_same(tmp_path: Path) -> None:
    """Its score is added up in another order, and bf16 may move an example."""
    path = write_study(tmp_path, tasks={name: {"task.name": name} for name in ("a", "b")})
    plan = Plan(load_study(path), path)
    found = tables(plan, summed(plan, {"uniform": (0.8, 0.9), "last": (0.7, 0.9 - 1e-9)}))
    difference = of(found["axis-mapping"], "mapping", "last")["difference mean"]
    assert difference == pytest.approx(-0.1 / 0.3)


def test_one_example_makes_no_other_teacher(plan: Plan) -> None:
    records = kept(plan)
    for record in records:
        if record.run.condition.levels.get("mapping") == "last":
            file = plan.place(record.run).run / "predictions.npz"
            arrays = dict(np.load(file))
            (right, *_) = np.flatnonzero(arrays["dev/teacher"].argmax(axis=1) == LABELS)
            arrays["dev/teacher"][right] = arrays["dev/teacher"][right, ::-1]
            np.savez_compressed(file, **arrays)
    assert "Teachers differ" not in " ".join(tables(plan, records)["axis-mapping"].notes)


def test_one_metric_of_one_set_is_read_between_its_own_ends(plan: Plan) -> None:
    """Its floor is the best answer by this metric, which the summary's one may not be."""
    kept(plan)
    metric = plan.spec.metric.model_copy(update={"path": "after.scores.dev.f1"})
    tasks = {
        name: {"task": {**section["task"], "metrics": ["accuracy", "f1"]}}
        for name, section in plan.spec.tasks.items()
    }
    spec = plan.spec.model_copy(update={"metric": metric, "tasks": tasks})
    plan = Plan(spec, plan.path)
    records = []
    for run in plan.all_runs():
        outputs = np.load(plan.place(run).run / "predictions.npz")["dev/outputs"]
        records.append(Record(run, "finished", f1(outputs.argmax(axis=1)), 1.0))
    table = tables(plan, records)["axis-mapping-good"]
    # all of class 1
    floor = f1(np.ones(EXAMPLES))
    teacher = f1(logits(TEACHER["good"], np.random.default_rng(0)).argmax(axis=1))
    assert of(table, "mapping", "one answer")["good mean"] == pytest.approx(floor)
    assert of(table, "mapping", "teacher")["good mean"] == pytest.approx(teacher)
    values = [r.value for r in records if r.run.key.startswith("good/mapping=last/")]
    share = (np.mean(values) - floor) / (teacher - floor)
    last = of(table, "mapping", "last")
    assert last["kept mean"] == pytest.approx(share)
    # examples count beside the seeds
    assert last["difference freedom"] > SEEDS - 1


def f1(said: NDArray[Any]) -> float:
    """Of class 1."""
    hits = ((said == 1) & (LABELS == 1)).sum()
    return float(2 * hits / ((said == 1).sum() + (LABELS == 1).sum()))


def test_a_broken_file_is_named(plan: Plan) -> None:
    records = kept(plan)
    run: Run = records[0].run
    path = plan.place(run).run / "predictions.npz"
    for content in (b"PK", b"no file of arrays", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"predictions\.npz can't be read"):
            tables(plan, records)
