"""Tables of a study from made-up scores: what is averaged, compared, ranked and left out."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from study_files import MAPPINGS, WEIGHTS, write_study

from fastkd.study import load_study
from fastkd.study.locks import Claim
from fastkd.study.plan import Condition, Plan, Run
from fastkd.study.plots import make_plots
from fastkd.study.report import write_page
from fastkd.study.results import Results
from fastkd.study.storage import Record, Store
from fastkd.study.tables import make_tables

TASKS = {"a": {"task.name": "x"}, "b": {"task.name": "y"}}
AXES = {"mapping": MAPPINGS, "size": {"small": {}, "large": {"train.batch_size": 8}}}
OFF = {"alone": {"losses.hidden.weight": 0.5}}
# what each level adds
ADDED = {"uniform": 0.0, "last": -0.1, "small": 0.0, "large": 0.4, None: -1.0, "a": 0.0, "b": 3.0}


def _plan(folder: Path, **changes: Any) -> Plan:
    path = write_study(folder, **{"tasks": TASKS, "axes": AXES, "controls": OFF, **changes})
    return Plan(load_study(path), path)


def _value(run: Run) -> float:
    """Sum of what the levels add, and a little that differs from seed to seed."""
    levels = [str(level) for level in run.condition.levels.values()] or [None]
    noise = (len("".join(map(str, [*levels, run.task]))) % 7 + 1) * 1e-4 * (run.seed + 1) ** 2
    return 1 + sum(ADDED[level] for level in [*levels, run.task]) + noise


def _records(
    plan: Plan, missing: Callable[[Run], bool] = lambda run: False, extra: Sequence[Condition] = ()
) -> list[Record]:
    return [
        Record(run, "failed", message="why")
        if missing(run)
        else Record(run, "finished", _value(run), 1.0)
        for condition in [*plan.conditions, *extra]
        for run in plan.runs(condition)
    ]


def _written(figure: Figure) -> str:
    """Below its panels."""
    return figure.get_supxlabel()


def _mean(plan: Plan, **levels: str) -> float:
    values = [
        _value(run)
        for condition in plan.conditions
        if condition.levels and levels.items() <= condition.levels.items()
        for run in plan.runs(condition)
    ]
    return sum(values) / len(values)


def test_a_full_grid_averages_the_other_axes(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    results = Results(plan, _records(plan))
    tables = {table.name: table for table in make_tables(results, {})}
    alone, uniform, last = tables["axis-mapping"].numbers
    assert last["all mean"] == pytest.approx(_mean(plan, mapping="last"))
    expected = _mean(plan, mapping="last") - _mean(plan, mapping="uniform")
    assert last["difference mean"] == pytest.approx(expected)
    assert last["difference seeds"] == 2 and "difference seeds" not in uniform
    # what stands outside the axes is compared with the average over the other axes
    without = [_value(run) for run in plan.runs(plan.conditions[0])]
    assert alone["difference mean"] == pytest.approx(
        sum(without) / 4 - _mean(plan, mapping="uniform")
    )
    assert tables["axis-mapping"].rows[0][0] == "alone (control)"
    assert last["a mean"] == pytest.approx(last["b mean"] - 3, abs=0.01)
    names = [row["condition"] for row in tables["conditions"].numbers]
    assert names == [condition.name for condition in plan.conditions] and len(names) == 5


def test_axes_are_averaged_over_what_every_level_has(tmp_path: Path) -> None:
    loss = {"one": {}, "other": {"train.steps": 9}}
    ADDED.update({"one": 0.0, "other": -0.3})
    plan = _plan(
        tmp_path,
        axes={**AXES, "loss": loss},
        skip=[{"mapping": "last", "loss": "other"}],
    )
    results = Results(plan, _records(plan))
    tables = {table.name: table for table in make_tables(results, {})}
    _, uniform, last = tables["axis-mapping"].numbers
    # or the worse loss would count for the one mapping that has it
    assert uniform["all mean"] == pytest.approx(_mean(plan, mapping="uniform", loss="one"))
    assert last["all mean"] == pytest.approx(_mean(plan, mapping="last"))
    assert last["difference mean"] == pytest.approx(last["all mean"] - uniform["all mean"])
    note = "averaged over size, loss, of combinations that every level has."
    assert note in tables["axis-mapping"].notes[0]
    assert "averaged over mapping, loss." in tables["axis-size"].notes[0]
    cells = results.cells("mapping", "size", "a")
    assert {score.others for scores in cells.values() for score in scores} == {("one",)}
    # two levels that have nothing in common
    apart = [{"mapping": "last", "loss": "one"}, {"mapping": "uniform", "loss": "other"}]
    plan = _plan(tmp_path, axes={"mapping": MAPPINGS, "loss": loss}, skip=apart)
    (table, *_) = make_tables(Results(plan, _records(plan)), {})
    assert "these means are of different things" in table.notes[0]
    assert table.numbers[2]["all mean"] == pytest.approx(_mean(plan, mapping="last"))
    make_plots(Results(plan, []), {})


def test_levels_are_averaged_over_what_all_have_finished(tmp_path: Path) -> None:
    """A level without its worst cell would look better than it is, in tables and pictures."""
    plan = _plan(tmp_path, tasks=None)

    def missing(run: Run) -> bool:
        return run.condition.levels == {"mapping": "last", "size": "small"}

    results = Results(plan, _records(plan, missing))
    tables = {table.name: table for table in make_tables(results, {})}
    table = tables["axis-mapping"]
    found = {str(row["mapping"]): row for row in table.numbers}
    for level in ("uniform", "last"):
        mean = _mean(plan, mapping=level, size="large")
        assert found[level]["all mean"] == pytest.approx(mean) and found[level]["all seeds"] == 2
    assert found["last"]["difference mean"] == pytest.approx(
        _mean(plan, mapping="last", size="large") - _mean(plan, mapping="uniform", size="large")
    )
    assert table.rows[2][0] == "last (2 of 4 runs)"
    assert (
        "averaged over size, of the 1 of 2 combinations that every level has finished"
        in (table.notes[0])
    )
    figures = make_plots(results, {})
    axes = figures["axis-mapping"].axes[0]
    (bars,) = axes.containers
    assert isinstance(bars, ErrorbarContainer)
    assert next(iter(bars.lines[0].get_ydata())) == pytest.approx(found["uniform"]["all mean"])
    assert _written(figures["axis-mapping"]) == "means of what all levels have finished"
    assert _written(make_plots(Results(plan, _records(plan)), {})["axis-mapping"]) == ""


def test_no_mean_where_levels_have_finished_nothing_alike(tmp_path: Path) -> None:
    plan = _plan(tmp_path, tasks=None)
    apart = [{"mapping": "last", "size": "small"}, {"mapping": "uniform", "size": "large"}]
    results = Results(plan, _records(plan, lambda run: run.condition.levels in apart))
    table = next(t for t in make_tables(results, {}) if t.name == "axis-mapping")
    assert [row[1] for row in table.rows[1:]] == ["0 seeds", "0 seeds"]
    assert "no combination is finished at every level, so there are none" in table.notes[0]
    assert not any("difference mean" in row for row in table.numbers)
    # a level with nothing at all takes nothing from the others
    results = Results(plan, _records(plan, lambda r: r.condition.levels.get("mapping") == "last"))
    table = next(t for t in make_tables(results, {}) if t.name == "axis-mapping")
    assert table.numbers[1]["all mean"] == pytest.approx(_mean(plan, mapping="uniform"))
    assert table.rows[2][1] == "0 seeds" and "averaged over size." in table.notes[0]


def test_a_map_averages_what_all_of_its_fields_have_finished(tmp_path: Path) -> None:
    loss = {"one": {}, "other": {"train.steps": 9}}
    ADDED.update({"one": 0.0, "other": -0.3})
    plan = _plan(tmp_path, axes={**AXES, "loss": loss})
    failed = {"mapping": "last", "size": "small", "loss": "other"}

    def missing(run: Run) -> bool:
        return run.task == "a" and run.condition.levels == failed

    results = Results(plan, _records(plan, missing))
    for task, expected in (("a", {("one",)}), ("b", {("one",), ("other",)})):
        cells = results.cells("mapping", "size", task)
        assert {score.others for scores in cells.values() for score in scores} == expected
    picture = make_plots(results, {})["map-mapping-size"]
    assert picture.get_suptitle() == "mean over seeds, of what all levels have finished"
    # of the other task alone nothing is left out
    tables = {table.name: table for table in make_tables(results, {})}
    assert "averaged over size, loss." in tables["axis-mapping-b"].notes[0]
    assert "of the 3 of 4 combinations" in tables["axis-mapping"].notes[0]
    assert "of the 3 of 4 combinations" in tables["axis-mapping-a"].notes[0]


def test_a_hypothesis_waits_for_every_run_of_its_own_conditions(tmp_path: Path) -> None:
    """Not for those of a third one, by which its difference is no other either."""
    levels = {**MAPPINGS, "first": {"layer_map": "first"}}
    ADDED["first"] = -0.2
    asked = [{"axis": "mapping", "level": level} for level in ("last", "first")]
    plan = _plan(tmp_path, axes={**AXES, "mapping": levels}, seeds=8, hypotheses=asked)
    small = {"mapping": "first", "size": "small"}
    results = Results(
        plan, _records(plan, lambda run: run.condition.levels.items() == small.items())
    )
    whole, open_ = results.answers()
    assert whole.p is not None and open_.p is open_.corrected is None
    assert whole.difference is not None
    expected = _mean(plan, mapping="last") - _mean(plan, mapping="uniform")
    assert whole.difference.mean == pytest.approx(expected)


def test_other_grids_hold_the_other_axes_at_the_baseline(tmp_path: Path) -> None:
    plan = _plan(tmp_path, grid="one_axis_at_a_time")
    rows = Results(plan, _records(plan)).axis("mapping")[1:]
    # the run with the large size counts for its own axis alone, not for mapping=uniform
    assert [len(row.scores) for row in rows] == [4, 4]
    assert {score.others for row in rows for score in row.scores} == {("small",)}


def test_each_task_is_compared_alone_too(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    made = make_tables(Results(plan, _records(plan)), {})
    tables = {table.name: table for table in made}
    found = tables["axis-mapping-b"].numbers[2]
    levels = {"mapping": "last"}, {"mapping": "uniform"}
    mine, base = (
        statistics.fmean(
            _value(run)
            for condition in plan.conditions
            if condition.levels and of.items() <= condition.levels.items()
            for run in plan.runs(condition)
            if run.task == "b"
        )
        for of in levels
    )
    assert found["all mean"] == found["b mean"] == pytest.approx(mine)
    assert found["difference mean"] == pytest.approx(mine - base)
    assert found["difference seeds"] == 2
    assert "a mean" not in found and tables["axis-mapping-b"].columns[1] == "mean"
    # too many for a terminal
    assert not tables["axis-mapping-b"].brief and tables["axis-mapping"].brief


def test_no_average_over_tasks_while_one_is_missing(tmp_path: Path) -> None:
    plan = _plan(tmp_path)

    def missing(run: Run) -> bool:
        return run.condition.levels.get("mapping") == "last" and run.task == "a"

    results = Results(plan, _records(plan, missing))
    tables = {table.name: table for table in make_tables(results, {})}
    row, columns = tables["axis-mapping"].rows[2], tables["axis-mapping"].columns
    assert row[columns.index("a")] == row[columns.index("all")] == "0 seeds"
    assert "±" in row[columns.index("b")] and "±" in tables["axis-mapping-b"].rows[2][1]


def test_runs_that_wait_are_counted_and_those_of_a_control_by_task(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    records = [
        Record(r.run, "waiting") if r.run.seed and not r.run.condition.levels else r
        for r in _records(plan)
    ]
    tables = {table.name: table for table in make_tables(Results(plan, records), {})}
    runs = tables["runs"]
    assert runs.rows == [] and runs.notes == ("2 runs have not begun.",)
    assert runs.title == "runs that are not finished" and len(runs.numbers) == len(records)
    assert tables["axis-mapping"].rows[0][0] == "alone (control) (2 of 4 runs)"
    assert tables["axis-mapping-a"].rows[0][0] == "alone (control) (1 of 2 runs)"


def test_seeds_that_are_open_are_counted_on(tmp_path: Path) -> None:
    plan = _plan(tmp_path, seeds=5)

    def said(missing: Callable[[Run], bool]) -> str:
        results = Results(plan, _records(plan, missing))
        (table,) = (one for one in make_tables(results, {}) if one.name == "axis-mapping")
        return table.notes[-1]

    assert "would see a difference of" in said(lambda run: False)
    assert "all 5 seeds" not in said(lambda run: False)
    early = said(lambda run: run.seed > 1)
    (now, then) = re.findall(r"(?:difference of|stays,) ([0-9.e-]+[0-9])", early)
    assert "; with all 5 seeds, if their spread stays, " in early and float(then) < float(now)


def test_runs_that_do_not_differ_see_no_difference_of_nothing(tmp_path: Path) -> None:
    plan = _plan(tmp_path, seeds=3)
    same = [replace(record, value=0.5) for record in _records(plan)]
    (table,) = (t for t in make_tables(Results(plan, same), {}) if t.name == "axis-mapping")
    assert "nothing can be said" in table.notes[-1]
    assert not any("would see a difference" in note for note in table.notes)


@pytest.mark.parametrize("seeds", [4, 5])
def test_intervals_of_few_seeds_say_so(seeds: int, tmp_path: Path) -> None:
    plan = _plan(tmp_path, seeds=seeds)
    for table in make_tables(Results(plan, _records(plan)), {}):
        said = "of three in about 92, of two in about 88." in " ".join(table.notes)
        assert said == (seeds < 5 and table.name != "runs")


def test_what_failed_is_counted_and_said(tmp_path: Path) -> None:
    plan = _plan(tmp_path)

    def missing(run: Run) -> bool:
        return run.condition.levels.get("mapping") == "last" and run.seed == 1 and run.task == "a"

    results = Results(plan, _records(plan, missing))
    tables = {table.name: table for table in make_tables(results, {})}
    row = tables["axis-mapping"].rows[2]
    columns = tables["axis-mapping"].columns
    assert row[0] == "last (6 of 8 runs)"
    assert [row[columns.index(name)] for name in ("a", "all")] == ["1.1 (1 seed)", "2.6 (1 seed)"]
    assert "±" in row[columns.index("b")]
    # one seed is left that both have on all tasks, and one is no result
    assert "difference mean" not in tables["axis-mapping"].numbers[2]
    assert tables["axis-mapping-b"].numbers[2]["difference seeds"] == 2
    failed = tables["runs"].rows
    assert [cells[0] for cells in failed] == [
        f"a/mapping=last,size={size}/seed-1" for size in ("small", "large")
    ]
    assert {cells[1:] for cells in failed} == {("failed", "why")}


@pytest.mark.parametrize(
    ("direction", "best"),
    [("maximize", "mapping=uniform,size=large"), ("minimize", "alone")],
)
def test_best_is_the_best_of_those_that_are_finished(
    direction: str, best: str, tmp_path: Path
) -> None:
    plan = _plan(tmp_path, metric={"path": "after.score", "direction": direction})
    results = Results(plan, _records(plan))
    found = results.best()
    assert found is not None and found[0] == best
    better = "higher" if direction == "maximize" else "lower"
    notes = " ".join(note for table in make_tables(results, {}) for note in table.notes)
    assert f"after.score, {better} is better." in notes
    unfinished = Results(plan, _records(plan, lambda run: run.key.endswith(f"{best}/seed-1")))
    second = unfinished.best()
    assert second is not None and second[0] != best
    assert Results(plan, _records(plan, lambda run: True)).best() is None


def test_a_search_shows_its_best_candidates_after_what_they_are_compared_with(
    tmp_path: Path,
) -> None:
    options = {"axes": {"mapping": MAPPINGS}, "spaces": {"weight": WEIGHTS}}
    plan = _plan(tmp_path, search={"trials": 12}, **options)
    ADDED.update({str(0.1 * n): -0.01 * n for n in range(1, 13)} | {"baseline": 0.0})
    extra = [
        plan.candidate(f"trial-{n:04d}", {"mapping": "last", "weight": 0.1 * n})
        for n in range(12, 0, -1)
    ]
    results = Results(plan, _records(plan, lambda run: run.condition.name == "trial-0003", extra))
    table = {t.name: t for t in make_tables(results, {})}["conditions"]
    names = [row[0] for row in table.rows]
    assert names[:3] == ["alone (control)", "baseline", "trial-0001 mapping=last weight=0.1"]
    assert len(names) == 12 and not any("trial-0003" in name or "0012" in name for name in names)
    assert "optimistic" in table.notes[0]


def test_a_candidate_that_was_stopped_is_not_drawn(tmp_path: Path) -> None:
    """It may have finished the task alone on which all scores are high."""
    plan = _plan(tmp_path, axes=None, spaces={"weight": WEIGHTS}, search={"trials": 2})
    ADDED.update({"1.0": 0.0, "2.0": 0.0, "baseline": 0.0})
    weights = {f"trial-{n:04d}": {"weight": float(n + 1)} for n in range(2)}
    extra = [plan.candidate(name, levels) for name, levels in weights.items()]
    records = _records(
        plan, lambda run: run.condition.name == "trial-0001" and run.task == "a", extra
    )
    (axes,) = make_plots(Results(plan, records), {})["search"].axes
    (bars,) = axes.containers
    assert isinstance(bars, ErrorbarContainer)
    assert list(bars.lines[0].get_xdata()) == [1.0]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_wins_are_of_the_better_one(direction: str, tmp_path: Path) -> None:
    metric = {"path": "after.total", "direction": direction}
    asked = [{"axis": "mapping", "level": "last"}]
    plan = _plan(tmp_path, metric=metric, seeds=6, hypotheses=asked)
    (answer,) = Results(plan, _records(plan)).answers()
    assert answer.difference is not None and answer.difference.mean < 0
    assert answer.improvement == (direction == "minimize")


def test_every_picture_is_drawn_also_of_nothing(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path, axes={**AXES, "weight": {n: {"train.steps": 9} for n in ("1", "2", "4")}}
    )
    ADDED.update({"1": 0.1, "2": 0.2, "4": 0.3})
    for records in (_records(plan), _records(plan, lambda run: True)):
        results = Results(plan, records)
        figures = make_plots(results, {})
        assert figures.keys() == {
            *(f"axis-{axis}" for axis in plan.axes),
            "map-mapping-size",
            "map-mapping-weight",
            "map-size-weight",
        }
        page = write_page(plan, make_tables(results, {}), figures)
        assert page.read_text().count("<figure>") == 6
    # a task, and both together: levels in a line where they are numbers
    axes = make_plots(Results(plan, _records(plan)), {})["axis-weight"].axes
    assert [a.get_title() for a in axes] == ["a", "b", "all tasks"]
    assert list(axes[0].get_xticks()) == pytest.approx([0, 0.30103, 0.60206], abs=1e-5)


def test_a_control_that_the_first_panel_lacks_is_in_the_legend(tmp_path: Path) -> None:
    plan = _plan(tmp_path, controls={**OFF, "short": {"train.steps": 2}})

    def missing(run: Run) -> bool:
        return run.task == "a" and run.condition.name == "alone"

    (legend,) = make_plots(Results(plan, _records(plan, missing)), {})["axis-mapping"].legends
    said = [text.get_text() for text in legend.get_texts()]
    assert {"alone", "short"} <= set(said) and len(said) == len(set(said))


def test_a_level_named_as_the_teacher_is_no_teacher(tmp_path: Path) -> None:
    init = {"teacher": {}, "random": {"student.init": "random"}}
    plan = _plan(tmp_path, axes={"init": init}, tasks=None, controls=None)
    ADDED.update({"teacher": 0.1, "random": 0.0})
    for run in plan.all_runs():
        folder = plan.place(run).run
        folder.mkdir(parents=True)
        summary = {"after": {"baseline": {"score": 0.5}}, "teacher": {"score": 2.0}}
        (folder / "summary.json").write_text(json.dumps(summary))
    (table, *_) = make_tables(Results(plan, _records(plan)), {})
    assert [row["init"] for row in table.numbers] == [
        *("one answer", "the teacher", "teacher", "random")
    ]


def test_a_trial_that_ends_while_it_is_looked_at_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(tmp_path)
    mine, theirs = Store(plan), Store(plan)
    mine.add_work()
    work = theirs.take()
    assert work is not None
    take = Claim.take

    def late(path: Path) -> Claim | None:
        if work.claim.handle >= 0:
            theirs.score(work, work.runs[0], 1.0, 1.0)
            theirs.finish(work)
            work.claim.release()
            work.claim.handle = -1
        return take(path)

    monkeypatch.setattr(Claim, "take", late)
    other = mine.take()
    assert other is not None and other.trial.number != work.trial.number
    other.claim.release()
