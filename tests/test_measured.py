"""What README.md and docs/measured.md say of the CPU, held against the committed results."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from page_tables import agrees, section_rows, table_rows

from benchmarks.rerun import QUOTED, QUOTED_LONG, RESULTS, ROOT

STEPS = {(8, 128): "8 x 128", (2, 512): "2 x 512"}
COLUMNS = ("fastkd distill", "fastkd distill, ZeRO-1", "fastkd", "output_attentions")
PAIRED = "median of pairs"
OPS = [
    "test_attention_score_mse",
    "test_attention_divergence",
    "test_hidden_mse",
    "test_hidden_cosine",
    "test_logits_divergence",
]
QUOTED_BY_README = "test_attention_score_mse[bert-base-to-tinybert-4-2048]"


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("name", "heading"), [("README.md", "## Why"), ("docs/measured.md", "## A training step")]
)
def test_training_steps(name: str, heading: str) -> None:
    rows = {row[0]: row[1:] for row in section_rows(page(name), heading)}
    for (batch, tokens), shape in STEPS.items():
        found = result(f"training-step-cpu-{batch}x{tokens}")
        ratios = found["times the trivial step, median of paired rounds"]
        for column, cell in zip(COLUMNS, rows[shape], strict=True):
            assert agrees(cell.removesuffix(" x"), ratios[column]), (shape, column)


def test_ops() -> None:
    every = [name for of in (QUOTED, QUOTED_LONG) for names in of.values() for name in names]
    # the page has an op's rows together
    order = sorted(every, key=lambda name: OPS.index(name.partition("[")[0]))
    benchmarks = result("kernels-cpu")["benchmarks"]
    rows = section_rows(page("docs/measured.md"), "## One op")
    for (_, ratio, *sizes), name in zip(rows, order, strict=True):
        check_op(name, benchmarks[name], [ratio, *sizes])
    (said,) = re.findall(
        r"`attention_score_mse` takes (\d+) times \((\d+) to (\d+)\) as long as the op and "
        r"(\d+) MB where the op takes (\d+) MB",
        page("README.md").replace("\n", " "),
    )
    ratio, low, high, plain, held = said
    check_op(QUOTED_BY_README, benchmarks[QUOTED_BY_README], [ratio, held, plain])
    rounds = benchmarks[QUOTED_BY_README]["range_of_times_the_op"]["definition"]
    assert all(agrees(one, end) for one, end in zip((low, high), rounds, strict=True))


def check_op(name: str, found: dict[str, Any], cells: list[str]) -> None:
    """The definition's time over the op's, and what both hold."""
    op = found["shape"].get("chosen", "op")
    held = found["peak_megabytes"]
    values = [found["times_the_op"]["definition"], held[op], held["definition"]]
    for cell, value in zip(cells, values, strict=True):
        said = cell.split()[0]
        assert agrees(said, value), (name, cell, value)
    assert ("slower" in cells[0]) == (values[0] < 1), name


def test_compiled_steps() -> None:
    text = page("docs/measured.md").replace("\n", " ")
    pattern = r"takes ([\d.]+) times as long as a \[compiled\].*? and ([\d.]+) times at"
    (said,) = re.findall(pattern, text)
    found = result("compiled-cpu")["rows x tokens"]
    for number, entry in zip(said, found.values(), strict=True):
        assert agrees(number, entry[f"eager step / compiled step, {PAIRED}"])


def test_a_teacher_in_eight_bits() -> None:
    found = result("teacher-dtypes")["rows x tokens"]
    for name, *cells in section_rows(page("docs/measured.md"), "## A teacher in eight bits"):
        key = f"fp32 / {name.replace('`', '')}, {PAIRED}"
        for cell, entry in zip(cells, found.values(), strict=True):
            assert agrees(cell.removesuffix(" x"), entry[key]), name


def test_the_readme_has_its_peers_from_the_whole_tables() -> None:
    tables = page("benchmarks/README.md").partition("| BERT-base to 4 x 312 |")[2]
    rows = {tuple(row[:2]): row[2:] for row in table_rows(tables.partition("\n\n")[0])}
    said = [row for row in section_rows(page("README.md"), "## Why") if "MB" in row[1]]
    assert len(said) == 5
    for name, *cells in said:
        row = rows[tuple(name.split(", "))]
        for cell, ratio, size in zip(cells, row[::2], row[1::2], strict=True):
            times = "1" if name.startswith("fastkd") else ratio.split()[0]
            assert cell == f"{times}, {size} MB", name
