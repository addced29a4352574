"""Pages in a browser: nothing is loaded, too wide, too faint, too small or on top of each other, in
a light and a dark mode, on a phone and on a desktop; and a pointer is told every value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import look, needs_chromium
from study_files import MAPPINGS, TASKS, WEIGHTS, write_study
from tiny_runs import make_recipe

import fastkd
from fastkd.layer_similarity import write_similarity
from fastkd.layer_similarity.compare import Similarity
from fastkd.reporting.html import document
from fastkd.reporting.report import write_report
from fastkd.reporting.style import DARK, LIGHT, LINES
from fastkd.reporting.svg import Line, Panel, chart
from fastkd.study import load_study
from fastkd.study.plan import Plan
from fastkd.study.plots import make_plots
from fastkd.study.report import write_page
from fastkd.study.results import Results
from fastkd.study.storage import Record
from fastkd.study.tables import make_tables
from fastkd.training.metric_lines import values_of
from fastkd.training.run_folder import RunFolder

WIDTHS = [360, 1280]
# how eyes without the cones of long or middle wavelengths see linear sRGB (Machado and others,
# 2009, severity 1)
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with several teacher layers for a student layer, whose time was measured."""
    recipe = make_recipe(
        tmp_path_factory.mktemp("run"),
        train={"steps": 6, "evaluate_every": 3, "profile": True},
    )
    folder = RunFolder(fastkd.distill(recipe, {"layer_map": "mean_loss"}, quiet=True).folder)
    write_report(folder)
    return folder


def study(folder: Path, **changes: Any) -> Path:
    """The page of a study whose runs have values of no meaning."""
    folder.mkdir()
    path = write_study(folder, tasks=TASKS, seeds=3, **changes)
    plan = Plan(load_study(path), path)
    conditions, importances = list(plan.conditions), {}
    if changes.get("search"):
        conditions += [plan.candidate(f"t{n}", {"weight": 10 ** (n / 2 - 1)}) for n in range(6)]
        importances = {"fANOVA": {"weight": 1.0}, "PED-ANOVA": {"weight": 1.0}}
    runs = [run for condition in conditions for run in plan.runs(condition)]
    records = [Record(run, "finished", 0.5 + n % 7 / 50, 1.0) for n, run in enumerate(runs)]
    results = Results(plan, records)
    return write_page(plan, make_tables(results, importances), make_plots(results, importances))


@pytest.fixture(scope="module")
def pages(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pages")
    weights = {f"{w:g}": {"losses.hidden.weight": w} for w in (0.1, 1.0, 10.0)}
    grid = study(folder / "grid", axes={"mapping": MAPPINGS, "weight": weights})
    search = study(folder / "search", axes=None, spaces={"weight": WEIGHTS}, search={"trials": 6})
    cka = np.linspace(0.0, 1.0, 5 * 13).reshape(5, 13)
    alike = Similarity(cka, cka[1:, 1:], "js", None, (4, 4), 9999, (8, 8))
    write_similarity(alike, folder / "similarity")
    # steps of five to seven digits, whose labels reach beyond their ticks
    ends = (20_000, 99_999, 150_000, 1_000_000, 2_000_000)
    steps = [Panel([Line("", (0, end // 2, end), (1.0, 2.0, 3.0))]) for end in ends]
    long = folder / "long.html"
    long.write_text(document("long", [chart(steps)]))
    return [run.report, grid, search, folder / "similarity" / "similarity.html", long]


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_is_fit_to_read(pages: list[Path], tmp_path: Path, dark: bool) -> None:
    found = look(tmp_path, pages, WIDTHS, dark=dark)
    assert len(found) == len(pages) * len(WIDTHS)
    paper = (DARK if dark else LIGHT)["paper"]
    expected = f"rgb({', '.join(str(int(paper[n : n + 2], 16)) for n in (1, 3, 5))})"
    for one in found:
        where = one.pop("address").rsplit("/", 3)[-3:], one.pop("width")
        assert one.pop("background") == expected, where
        assert one.pop("wide") <= 0 and one.pop("unnamed") == 0, where
        assert not any(one.values()), (where, one)


def told(page: str, kind: str) -> list[str]:
    return re.findall(rf'<\w+ class="{kind}"[^>]*><title>(.*?)</title>', page, flags=re.DOTALL)


def test_a_pointer_is_told_every_value_of_a_run(run: RunFolder) -> None:
    page, lines = run.report.read_text(), run.read_metrics()
    bands = told(page, "band")
    for line in lines:
        place = [band for band in bands if band.startswith(f"step {line['step']}\n")]
        for label, value in values_of(line, "losses").items():
            pair = label.partition("/")[2]
            assert any(f"{pair}: {value:.4g}" in band for band in place), label
    rates = [line["train/learning_rate"] for line in lines if line["kind"] == "train"]
    assert all(f"step {n}\n{rate:.4g}" in bands for n, rate in enumerate(rates, start=1))
    # two teacher layers a student layer, with half of the weight each
    links = told(page, "link")
    assert len(links) == 2 * 2 + 1
    assert "student layer 2 from teacher layer 4, weight in attention 0.5" in links[-1]
    profile = RunFolder(run.path).read_summary()["profile"]  # type: ignore[index]
    bars = told(page, "bar")
    assert len(bars) == len(profile["phases"]) + len(profile["memory_bytes"]) + 1


def test_a_pointer_is_told_every_value_of_a_study(pages: list[Path]) -> None:
    _, grid, search, *_ = (page.read_text() for page in pages)
    # three mappings or weights, as many panels as tasks and one for all
    assert len(re.findall(r"<title>[\w.]+, seed \d: 0\.\d+</title>", grid)) == (2 + 3) * 3 * 3
    assert len(re.findall(r"<title>[\w.]+: 0\.\d+ ± 0\.\d+</title>", grid)) == (2 + 3) * 3
    assert len(re.findall(r"<title>t\d, weight [\d.]+: 0\.\d+ ± 0\.\d+</title>", search)) == 6
    assert len(re.findall(r"<title>weight, [\w-]+: 1\.000</title>", search)) == 2


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(colour: np.ndarray) -> np.ndarray:
    """Where equal distances look alike (Ottosson, 2020)."""
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return opponents @ np.cbrt(np.clip(cones @ colour, 0, None))


@pytest.mark.parametrize("mode", [LIGHT, DARK])
@pytest.mark.parametrize("sight", SIGHT)
def test_lines_are_told_apart_by_any_eyes(mode: dict[str, str], sight: str) -> None:
    seen = [oklab(SIGHT[sight] @ linear(mode[f"line-{n}"])) for n in range(LINES)]
    apart = [np.linalg.norm(a - b) for n, a in enumerate(seen) for b in seen[:n]]
    # a just noticeable difference is about 0.02
    assert min(apart) > 0.09
