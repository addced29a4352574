"""The sentences of docs/glue.md against its tables, which `test_study_results.py` computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_tables import agrees, section_rows, table_rows

PAGE = (Path(__file__).parents[1] / "docs" / "glue.md").read_text(encoding="utf-8")
RECIPES = "## More steps, two stages, augmented data"
TASKS = ("STS-B", "MRPC", "CoLA", "SST-2")


def sentence(pattern: str) -> list[str]:
    """The numbers of the one sentence that reads so; `#` stands for a number."""
    numbered = re.escape(pattern).replace("\\#", r"([\d.]+)")
    found = re.findall(numbered, re.sub(r"\s+", " ", PAGE))
    assert len(found) == 1, (pattern, found)
    return [found[0]] if isinstance(found[0], str) else list(found[0])


def rows_of(heading: str) -> dict[tuple[str, ...], list[str]]:
    """The cells of a table by those that name a row."""
    named = 2 if heading in (RECIPES, "## Starts crossed with mappings") else 1
    return {tuple(row[:named]): row[named:] for row in section_rows(PAGE, heading)}


def score(heading: str, row: tuple[str, ...], column: int) -> float:
    return float(rows_of(heading)[row][column].split()[0])


def less_baseline(heading: str, *row: str) -> list[float]:
    """By how many points of the share a row lies below the baseline: mean, least and most."""
    mean, low, high = (
        -100 * float(number) for number in re.findall(r"[-+]?[\d.]+", rows_of(heading)[row][-1])
    )
    return [mean, high, low]


def test_differences_of_losses() -> None:
    asked = section_rows(PAGE, "## What was asked")
    of_attention = [row for row in asked if row[1] == "score_mse"]
    points = [100 * float(row[3].split()[0]) for row in of_attention]
    assert len(points) == 3
    said = sentence("KL, MSE of probabilities and cosine lie # to # points of that share above MSE")
    assert all(map(agrees, said, (min(points), max(points))))
    assert all("[-" in row[3] and ", +" in row[3] for row in of_attention)


@pytest.mark.parametrize(
    ("pattern", "axis", "rows"),
    [
        (
            "`uniform` is ahead of `emd` by # points of that share, of `last` and `first` by # and "
            "#. A `random` map, of which was asked whether it is as good, is # below",
            "## Axis: mapping",
            ("emd", "last", "first", "random"),
        ),
        (
            "three layers instead of every second one cost # points of that share",
            "## Axis: start",
            ("first_three",),
        ),
    ],
    ids=["mappings", "starts"],
)
def test_differences_of_an_axis(pattern: str, axis: str, rows: tuple[str, ...]) -> None:
    for said, row in zip(sentence(pattern), rows, strict=True):
        assert agrees(said, less_baseline(axis, row)[0]), row


def test_starts_and_maps_go_together() -> None:
    said = sentence(
        "from the first three layers students come to # under `uniform` and to # under `first`, "
        "where those of every second layer have # under `uniform`"
    )
    first, second = "first_three", "every_second"
    rows = (first, "uniform"), (first, "first"), (second, "uniform")
    for number, row in zip(said, rows, strict=True):
        assert agrees(number, score("## Starts crossed with mappings", row, 0)), row
    said = sentence("have # under `first` and # under `emd`, as much as from the outputs alone")
    for number, mapping in zip(said, ("first", "emd"), strict=True):
        assert agrees(number, score("## Starts crossed with mappings", (first, mapping), 0))


def test_what_more_steps_bring() -> None:
    short, outputs, labels = (
        less_baseline(RECIPES, *row)
        for row in (("tinybert", "short"), ("logits", "long"), ("labels", ""))
    )
    for pattern, values in (
        ("are # points of that share [#, #] ahead of 200", short),
        ("Four times the steps bring # points of the share [#, #], on both tasks", short),
        ("outputs alone are # points [#, #] behind after as many steps", outputs),
        ("labels alone # [#, #], on MRPC below one answer", labels),
    ):
        said = sentence(pattern)
        assert all(agrees(*pair) for pair in zip(said, values, strict=True)), (pattern, values)
    below = [less_baseline(RECIPES, "tinybert", of)[0] for of in ("stages", "augmented", "both")]
    said = sentence("Two stages, augmented data and both lie # to # points below 800 plain ones")
    assert all(map(agrees, said, (min(below), round(max(below) + 1e-9))))
    mrpc = [score(RECIPES, ("tinybert", of), 0) for of in ("long", "stages", "augmented", "both")]
    assert max(abs(value - mrpc[0]) for value in mrpc) <= 0.005 + 1e-9
    (said_points, *_) = sentence("augmented data in two stages lie # points of that score [#, #]")
    cola = [score(RECIPES, ("tinybert", of), 1) for of in ("long", "both")]
    assert agrees(said_points, 100 * (cola[0] - cola[1]))


def test_the_model_as_it_is() -> None:
    untouched, teachers, students = sentence(
        "it has #, fine-tuned teachers #, the best students #."
    )
    assert agrees(untouched, score("## Before any training", ("all-MiniLM-L6-v2",), 0))
    every = [row for part in PAGE.split("\n## Axis: ")[1:] for row in table_rows(part)]
    by_name = {row[0]: float(row[1].split()[0]) for row in every if re.match(r"-?\d", row[1])}
    assert agrees(teachers, by_name.pop("teacher"))
    assert agrees(students, max(by_name.values()))


def test_what_a_bad_weight_costs() -> None:
    said = sentence("A bad weight costs a loss up to # points on MRPC and # on CoLA")
    losses = {of: cells for of, cells in rows_of("## Weights").items() if "(" in cells[0]}
    for number, task in zip(said, ("MRPC", "CoLA"), strict=True):
        cells = [cells[TASKS.index(task)] for cells in losses.values()]
        costs = [float(cell.split()[0]) - float(cell.rpartition(", ")[2]) for cell in cells]
        assert agrees(number, 100 * max(costs)), (task, max(costs))


def test_teachers_on_dev_and_on_what_they_were_chosen_by() -> None:
    said = sentence("than on the selection part (CoLA # and #, SST-2 # and #)")
    dev = next(row for row in table_rows(PAGE.split("\n## Axis: ")[1]) if row[0] == "teacher")
    chosen = rows_of("## Weights")["teacher",]
    expected = [cells for at in (2, 3) for cells in (dev[1 + at], chosen[at])]
    for number, cell in zip(said, expected, strict=True):
        assert agrees(number, float(cell.split()[0])), cell
