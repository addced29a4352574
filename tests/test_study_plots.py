"""Pictures of a study: what their axes, legends and labels say, and of what is not there yet."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from study_files import MAPPINGS, TASKS, WEIGHTS, write_study

from fastkd.reporting import plotting
from fastkd.study import load_study
from fastkd.study.naming import Level
from fastkd.study.plan import Plan
from fastkd.study.plots import make_plots
from fastkd.study.report import write_page
from fastkd.study.results import Results
from fastkd.study.storage import Record
from fastkd.study.tables import make_tables

WIDE = {f"w{n}": {"train.steps": n} for n in range(1, 4)}


def results_of(
    folder: Path,
    *,
    done: bool = True,
    candidates: list[dict[str, Level]] | None = None,
    **given: Any,
) -> Results:
    path = write_study(folder, **given)
    plan = Plan(load_study(path), path)
    extra = [plan.candidate(f"t{n}", levels) for n, levels in enumerate(candidates or [])]
    runs = [run for condition in [*plan.conditions, *extra] for run in plan.runs(condition)]
    values = [0.5 + n % 7 / 50 for n in range(len(runs))]
    if done:
        return Results(
            plan, [Record(r, "finished", v, 1.0) for r, v in zip(runs, values, strict=True)]
        )
    return Results(plan, [Record(run, "waiting") for run in runs])


def search_panels(folder: Path, name: str, space: dict[str, Any], values: list[Level]) -> Axes:
    results = results_of(
        folder,
        axes=None,
        spaces={name: space},
        search={"trials": len(values)},
        candidates=[{name: value} for value in values],
    )
    (axes,) = make_plots(results, {})["search"].axes
    return axes


def test_no_two_controls_look_alike(tmp_path: Path) -> None:
    controls = {f"c{n}": {"losses.hidden.weight": 10.0 + n} for n in range(13)}
    figure = make_plots(results_of(tmp_path, controls=controls), {})["axis-mapping"]
    drawn = [line for line in figure.axes[0].lines if str(line.get_label()).startswith("c")]
    looks = {(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in drawn}
    assert len(looks) == len(drawn) == 13
    # and the legend is no wider than the picture, and leaves the panel its height
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width
    assert figure.axes[0].bbox.height > 150


def test_words_of_a_search_are_short_slanted_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    values = ["a" * 70, "b" * 40 + "1", "b" * 40 + "2"]
    space = {"field": "task.columns.label", "values": values}
    axes = search_panels(tmp_path, "label", space, [values[2], values[0], values[2], values[1]])
    labels = axes.get_xticklabels()
    assert [label.get_rotation() for label in labels] == [30] * 3
    assert [label.get_text()[0] for label in labels] == ["a", "b", "b"]
    assert max(len(label.get_text()) for label in labels) <= 25
    # values that are shortened alike stand at places of their own
    assert list(axes.containers[0].lines[0].get_xdata()) == [2, 0, 2, 1]


@pytest.mark.parametrize(
    "space", [{"low": 1, "high": 3, "integer": True}, {"values": [1, 2, 3]}], ids=["ends", "values"]
)
def test_whole_numbers_of_a_search_have_whole_ticks(tmp_path: Path, space: dict[str, Any]) -> None:
    axes = search_panels(tmp_path, "depth", {"field": "student.layers", **space}, [1, 2, 3])
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_study_not_begun_says_so_in_its_pictures(tmp_path: Path) -> None:
    given = {"tasks": TASKS, "axes": {"steps": WIDE, "mapping": MAPPINGS}}
    for name, figure in make_plots(results_of(tmp_path, done=False, **given), {}).items():
        assert set(texts(figure)) == {"no run is finished"}, name
        # no axis around 0, nor a scale of colours
        panels = [axes for axes in figure.axes if axes.axison]
        assert len(panels) == len(texts(figure))
        if name.startswith("axis"):
            assert not any(len(axes.get_yticks()) for axes in panels)
    space = {"axes": None, "spaces": {"weight": WEIGHTS}, "search": {"trials": 2}}
    figure = make_plots(results_of(tmp_path, done=False, **space), {})["search"]
    assert texts(figure) == ["no candidate is finished"]
    figure.draw_without_rendering()
    assert not any(label.get_text() for label in figure.axes[0].get_xticklabels(which="both"))


WORDS = {"field": "task.columns.label", "values": ["日本", "b"]}


def test_characters_that_no_font_has_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plotting, "fontManager", SimpleNamespace(ttflist=[]))
    candidates: list[dict[str, Level]] = [{"label": "日本"}, {"label": "b"}]
    given = {"axes": None, "spaces": {"label": WORDS}, "search": {"trials": 2}}
    results = results_of(tmp_path, candidates=candidates, **given)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        page = write_page(results.plan, make_tables(results, {}), make_plots(results, {}))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "no font here has 日本, so the .png pictures show boxes there" in said
    assert "日本</text>" in page.read_text().replace("\n", "")


def test_another_font_has_what_the_first_one_lacks() -> None:
    figure = Figure()
    figure.text(0.5, 0.5, "Ωж", family="STIXSizeFiveSym")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture, missing = plotting.png(figure)
    assert missing == frozenset()
    plain = Figure()
    plain.text(0.5, 0.5, "Ωж", family="STIXSizeFiveSym")
    assert plotting.png(plain)[0] == picture


def test_other_warnings_of_a_picture_are_heard() -> None:
    class Loud(Text):
        def draw(self, *_: Any, **__: Any) -> None:
            warnings.warn("something else", UserWarning, stacklevel=1)

    figure = Figure()
    figure.add_artist(Loud(0.5, 0.5, "x"))
    with pytest.warns(UserWarning, match="something else"):
        plotting.png(figure)
