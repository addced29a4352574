"""The committed studies' scores, recomputed from their predictions, and what is said of them."""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from committed_studies import (
    RESULTS,
    ROOT,
    TASKS,
    Runs,
    archive_of,
    read_predictions,
    read_runs,
)
from matplotlib.image import imread
from page_tables import agrees, section_rows, table_rows
from study_files import run

from fastkd.study.spec import load_study
from tools.study_state import unpack

AXES, STARTS, RECIPES = "study-glue-axes", "study-glue-starts", "study-glue-recipes"
TEACHERS, LONG = "study-glue-teachers", "study-glue-teachers-long"
RATES = ("5e-5", "1e-4", "2e-4")


class Chosen(NamedTuple):
    """A study that chooses one number of each loss."""

    field: str
    values: int
    losses: tuple[str, ...]


class Section(NamedTuple):
    """A study with a section of its own, and what that says of it."""

    heading: str
    condition: Callable[[str, str], str]
    """What the study calls the condition of a row, by its first two cells."""
    tasks: tuple[str, str]
    seeds: int
    said: str
    rows: int
    picture: str
    """Of the page, and of the report."""
    drawn: str
    asked: str = ""
    """Heading of what is tested, where something is."""


def crossed(start: str, mapping: str) -> str:
    # students without losses inside have no map
    loss, mapping = ("logits", "uniform") if mapping == "none" else ("tinybert", mapping)
    return f"start={start},mapping={mapping},loss={loss}"


SECTIONS = {
    STARTS: Section(
        heading="## Starts crossed with mappings",
        condition=crossed,
        tasks=("STS-B", "CoLA"),
        seeds=5,
        said="Five seeds",
        rows=3 * 7,
        picture="study-starts",
        drawn="map-start-mapping",
    ),
    RECIPES: Section(
        heading="## More steps, two stages, augmented data",
        condition="loss={},recipe={}".format,
        tasks=("MRPC", "CoLA"),
        seeds=10,
        said="Ten seeds",
        rows=7,
        picture="study-recipes",
        drawn="axis-recipe",
        asked="### What was asked of the recipes",
    ),
}
CHOSEN = {
    "study-glue-weights": Chosen(
        "weight", 5, ("tinybert", "score_mse", "prob_mse", "kl", "cosine", "relations", "hidden")
    ),
    "study-glue-rates": Chosen("rate", 5, ("logits", "labels", "general")),
}


@pytest.fixture(scope="module", params=[TEACHERS, LONG, *CHOSEN, AXES, *SECTIONS])
def study(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def runs(study: str) -> Runs:
    return read_runs(study)


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "glue.md").read_text(encoding="utf-8")


def test_scores_are_those_of_the_predictions(runs: Runs) -> None:
    for found in runs.values():
        assert found.student == pytest.approx(found.noted, abs=1e-6)


@pytest.mark.parametrize("study", [TEACHERS], indirect=True)
def test_the_page_has_the_teachers_by_their_rates(runs: Runs, page: str) -> None:
    rows = section_rows(page, "## Teachers")
    assert [row[0] for row in rows] == [*TASKS]
    assert len(runs) == len(TASKS) * len(RATES) * 2
    for task, *cells in rows:
        for rate, cell in zip(RATES, cells, strict=True):
            scores = [runs[task, f"rate={rate}", seed].student for seed in (0, 1)]
            assert says(cell, scores) and "±" in cell, (task, rate)


@pytest.mark.parametrize("study", [TEACHERS], indirect=True)
def test_the_rates_of_the_studies_are_the_best_but_one(runs: Runs, page: str) -> None:
    (said,) = re.findall(
        r"the best here too, but on SST-2, where 2e-4 is ([\d.]+) points ahead with a standard "
        r"deviation of ([\d.]+)\.",
        re.sub(r"\s+", " ", page),
    )
    by_rate = {
        task: {
            rate: [runs[task, f"rate={rate}", seed].student for seed in (0, 1)] for rate in RATES
        }
        for task in TASKS
    }
    best = {
        task: max(RATES, key=lambda r: statistics.fmean(found[r]))
        for task, found in by_rate.items()
    }
    steps = load_study(ROOT / "recipes" / f"{AXES}.yaml").shared["teacher"].tasks
    taken = {task: float(steps[task]["train.learning_rate"]) for task in TASKS}
    assert {task for task in TASKS if float(best[task]) != taken[task]} == {"SST-2"}
    found = by_rate["SST-2"]
    ahead = statistics.fmean(found["2e-4"]) - statistics.fmean(found["1e-4"])
    expected = ahead, statistics.stdev(found["2e-4"])
    assert all(agrees(n, 100 * value) for n, value in zip(said, expected, strict=True)), expected


@pytest.mark.parametrize("study", [LONG], indirect=True)
def test_what_longer_training_is_said_to_bring(runs: Runs, page: str) -> None:
    (said,) = re.findall(
        r"CoLA's has ([\d.]+) on the selection part and ([\d.]+) on dev, where those of the "
        r"studies have ([\d. ±]+); .* SST-2's has ([\d.]+) and ([\d.]+), those of the studies "
        r"([\d. ±]+)\. ",
        re.sub(r"\s+", " ", page),
    )
    teacher = next(row for row in table_rows(page.split("\n## Axis: ")[1]) if row[0] == "teacher")
    for task, rate, of in (("CoLA", "5e-5", said[:3]), ("SST-2", "1e-4", said[3:])):
        scores = {of: runs[task, f"rate={of}", 0].student for of in ("5e-5", "1e-4")}
        assert rate == max(scores, key=lambda of: scores[of]), scores
        dev = json.loads((RESULTS / f"teachers-long-dev-{task}.json").read_text())["score"]
        assert agrees(of[0], scores[rate]) and agrees(of[1], dev), (task, scores, dev)
        assert of[2] == teacher[1 + TASKS.index(task)]
        mean, deviation = map(float, of[2].split(" ± "))
        # no gain: within what seeds differ by, or below
        assert dev < mean + deviation


def test_the_page_says_how_many_examples_chose(page: str) -> None:
    sizes = {len(kept["selection/labels"]) for kept in read_predictions(TEACHERS).values()}
    assert f"one seed, {min(sizes)} to {max(sizes):,} examples a task" in page


@pytest.mark.parametrize("study", CHOSEN, indirect=True)
def test_the_page_has_the_best_of_each_loss(study: str, runs: Runs, page: str) -> None:
    chosen = CHOSEN[study]
    assert len(runs) == len(TASKS) * len(chosen.losses) * chosen.values
    of_tasks = [next(found for key, found in runs.items() if key[0] == task) for task in TASKS]
    rows = [
        f"| {name} | " + " | ".join(f"{getattr(found, field):.3f}" for found in of_tasks) + " |"
        for name, field in (("one answer", "constant"), ("teacher", "teacher"))
    ]
    for loss in chosen.losses:
        row = [f"`{loss}`"]
        for task in TASKS:
            of_task = {}
            for (name, condition, _), found in runs.items():
                if name == task and condition.startswith(f"loss={loss},"):
                    of_task[float(condition.rpartition("=")[2])] = found.student
            best = max(of_task, key=lambda value: of_task[value])
            row.append(f"{of_task[best]:.3f} ({best:g}), {min(of_task.values()):.3f}")
        rows.append("| " + " | ".join(row) + " |")
    missing = [row for row in rows if row not in page]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("study", [AXES], indirect=True)
def test_the_means_of_the_axes_are_those_of_the_predictions(runs: Runs, page: str) -> None:
    conditions = {condition for _, condition, _ in runs}
    baseline = "loss=tinybert,mapping=uniform,start=every_second"
    by_level = {name.rpartition("/")[2]: name for name in conditions if "=" not in name}
    for name in conditions - by_level.keys():
        own = set(name.split(",")) - set(baseline.split(","))
        for level in own or baseline.split(","):
            by_level[level.partition("=")[2]] = name
    seeds = sorted({seed for _, _, seed in runs})
    assert len(seeds) == 10 and "with ten seeds" in page
    rows = axis_rows(page)
    assert {row[0] for row in rows} == {"one answer", "teacher", *by_level}
    for label, *cells in rows:
        condition = by_level.get(label, baseline)
        of = {"one answer": "constant", "teacher": "teacher"}.get(label, "student")
        for task, cell in zip(TASKS, cells, strict=False):
            values = [getattr(runs[task, condition, seed], of) for seed in seeds]
            assert says(cell, values), (label, task, cell)


@pytest.mark.parametrize("study", SECTIONS, indirect=True)
def test_the_means_of_a_section_are_those_of_the_predictions(
    study: str, runs: Runs, page: str
) -> None:
    section = SECTIONS[study]
    seeds = sorted({seed for _, _, seed in runs})
    assert len(seeds) == section.seeds and f"\n{section.said} ([runs]" in page
    rows = section_rows(page, section.heading)
    assert len(rows) == 2 + section.rows
    for one, two, *cells in rows:
        of = {"one answer": "constant", "teacher": "teacher"}.get(one, "student")
        for task, cell in zip(section.tasks, cells, strict=False):
            # all of a task and seed have the same ends
            condition = section.condition(one, two) if two else one
            if of != "student":
                condition = next(name for name_of, name, _ in runs if name_of == task)
            values = [getattr(runs[task, condition, seed], of) for seed in seeds]
            assert says(cell, values), (one, two, task, cell)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Studies and what they have come to."""
    made = tmp_path_factory.mktemp("studies")
    shutil.copytree(ROOT / "recipes", made / "recipes")
    for name in (*CHOSEN, AXES, *SECTIONS):
        unpack(archive_of(name), made / "runs" / name)
    return made


@pytest.fixture
def studies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These in the working folder."""
    monkeypatch.chdir(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("studies")
@pytest.mark.parametrize("name", SECTIONS)
def test_the_table_of_a_section_is_the_report(name: str, page: str) -> None:
    section = SECTIONS[name]
    made = run(Path("recipes", f"{name}.yaml"), report_only=True)
    report = made.with_suffix(".md").read_text(encoding="utf-8")
    rows = section_rows(report, "## conditions")
    cells_of = {re.sub(r" \(.*", "", row[0]): row[1:] for row in rows}
    for one, two, *cells in section_rows(page, section.heading):
        # the report has the number of seeds before the last column
        *theirs, _, difference = cells_of[section.condition(one, two) if two else one]
        assert cells == [*theirs, difference], (one, two)
    if section.asked:
        compare_answers(section_rows(page, section.asked), report)
    compare_pictures(f"{section.picture}.png", made.parent / f"{section.drawn}.png")


@pytest.mark.slow
@pytest.mark.usefixtures("studies")
def test_the_tables_of_the_axes_are_the_report(page: str) -> None:
    made = run(Path("recipes", f"{AXES}.yaml"), report_only=True)
    report = made.with_suffix(".md").read_text(encoding="utf-8")
    cells_of = {re.sub(r" \(.*", "", row[0]): row[1:] for row in axis_rows(report, "## axis: ")}
    for label, *cells in axis_rows(page):
        # the report has the number of seeds before the last column
        theirs = cells_of[label]
        assert cells == [*theirs[:-2], theirs[-1]], label
    for label, *cells in section_rows(page, "## Beside what others found"):
        assert cells[:-1] == [points_of(made.parent, label, task) for task in TASKS], label
    compare_answers(section_rows(page, "## What was asked"), report)
    # what the page says of power: of losses, where the report has the controls among its rows
    (said,) = re.findall(
        r"a difference of ([\d.]+) between `tinybert` and another loss \(median of the seven\)",
        page.replace("\n", " "),
    )
    losses = load_study(ROOT / "recipes" / f"{AXES}.yaml").axes["loss"].keys() - {"tinybert"}
    with (made.parent / "axis-loss.csv").open(encoding="utf-8", newline="") as file:
        found = {row["loss"]: row["difference detectable"] for row in csv.DictReader(file)}
    assert len(losses) == 7
    assert agrees(said, statistics.median(float(found[loss]) for loss in losses))
    for axis in ("loss", "mapping", "start"):
        compare_pictures(f"study-{axis}.png", made.parent / f"axis-{axis}.png")


def test_the_table_before_any_training_is_the_result(page: str) -> None:
    result = json.loads((RESULTS / "zero-shot.json").read_text(encoding="utf-8"))
    said = section_rows(page, "## Before any training")
    assert len(said) == len(result["models"]) == 3
    for row, found in zip(said, result["models"].values(), strict=True):
        for cell, task in zip(row[1:], ("STS-B", "MRPC"), strict=True):
            expected = [found[task]["score"], *found[task]["interval"]]
            numbers = [float(number) for number in re.findall(r"[\d.]+", cell)]
            assert numbers == pytest.approx(expected, abs=0.0005 + 1e-9), (row[0], task)


def test_shares_that_are_said_are_those_of_the_tables(page: str) -> None:
    shares = {cell for row in axis_rows(page) for cell in row}
    for text in (page, (ROOT / "README.md").read_text(encoding="utf-8")):
        said = re.findall(r"[\d.]+ % \[[^]]*\]", text.replace("\n", " "))
        assert len(said) >= 3 and {one.replace(" %", "%") for one in said} <= shares


def compare_answers(asked: list[list[str]], report: str) -> None:
    answered = section_rows(report, "## hypotheses")
    assert [[cell.replace("`", "") for cell in row] for row in asked] == answered[1:]


def compare_pictures(shown: str, drawn: Path) -> None:
    committed = imread(ROOT / "docs" / "figures" / shown)
    np.testing.assert_allclose(imread(drawn), committed, atol=0.05, err_msg=shown)


def axis_rows(text: str, heading: str = "## Axis: ") -> list[list[str]]:
    """The cells of the tables under the headings of axes, of all tasks together."""
    found = []
    for part in text.split(f"\n{heading}")[1:]:
        title, _, rest = part.partition("\n")
        if not title.endswith(" alone"):
            found += table_rows(rest)
    # without the columns' names
    return [row for row in found if not row[1].startswith((":", "STS-B"))]


def points_of(report: Path, label: str, task: str) -> str:
    """By how many points of a task a condition lies above the baseline, and the interval."""
    for path in report.glob(f"axis-*-{task}.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if label == row[path.name.split("-")[1]]:
                    names = ("mean", "low", "high")
                    mean, low, high = (100 * float(row[f"difference {name}"]) for name in names)
                    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    raise KeyError(label)


def says(cell: str, values: list[float]) -> bool:
    """Whether a cell has the mean of values, and where it names one, their deviation."""
    mean, _, deviation = cell.partition(" ± ")
    spread_agrees = not deviation or agrees(deviation, statistics.stdev(values))
    return agrees(mean, statistics.fmean(values)) and spread_agrees
