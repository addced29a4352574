"""The pictures of a study: an axis with its errors, two axes as a map, a search's candidates."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fastkd.reporting.html import shortened
from fastkd.reporting.plotting import (
    DOTS,
    INK,
    POINT,
    REFERENCE,
    draw_map,
    plain,
    say,
    themed,
)
from fastkd.study.comparing import Row, differ
from fastkd.study.naming import Level, axes_map, axis_table, shown
from fastkd.study.results import Results
from fastkd.study.statistics import (
    Mean,
    Score,
    decimals,
    mean_over_seeds,
    of_all_tasks,
    seed_means,
)

_STYLES = ("--", ":", "-.", "-")
# of the lines of further controls
_COLOURS = (REFERENCE, INK, POINT)
_DEVIATION, _INTERVAL = "mean ± standard deviation", "mean with its 95 % interval"
# of a legend's entry, in inches: a character, the line before it with the gap behind, its height
_CHARACTER, _LINE, _LINE_HEIGHT = 0.08, 0.7, 0.22
# of a word at a tick
_WORD = 24
# where other axes are averaged over less than is planned
_OF_FINISHED = "of what all levels have finished"


@themed()
def make_plots(
    results: Results, importances: Mapping[str, Mapping[str, float]]
) -> dict[str, Figure]:
    """The figures of a study by file name, without the ending."""
    figures: dict[str, Figure] = {}
    if results.plan.spec.search is not None:
        figures["search"] = _search_plot(results)
        if importances:
            figures["importance"] = _importance_plot(importances)
        return figures
    for axis in results.plan.axes:
        figures[axis_table(axis)] = _axis_plot(results, axis)
    if results.full:
        for one, two in itertools.combinations(results.plan.axes, 2):
            figures[axes_map(one, two)] = _map_plot(results, one, two)
    return figures


class _Marks(NamedTuple):
    """What is drawn of a level or a control: its seeds, its mean, and that one's error."""

    level: str
    is_control: bool
    dots: list[tuple[float, str]]
    """Each with what is said of it."""
    mean: float | None
    error: float | None
    """To both sides, where it is known."""
    said: str


class _Panel(NamedTuple):
    """One pair of axes of an axis' picture."""

    title: str
    marks: list[_Marks]
    measure: str
    """What stands along the y axis."""
    errors: str
    """What the bars are."""


def _axis_plot(results: Results, axis: str) -> Figure:
    """One panel a task: mean and deviation of each level, its seeds as dots; and one of all."""
    rows, tasks = results.axis(axis), results.plan.tasks
    metric = plain(results.plan.spec.metric.path)
    panels = [
        _Panel(task or "", [_scored(r, _of_task(r.scores, task)) for r in rows], metric, _DEVIATION)
        for task in tasks
    ]
    if len(tasks) > 1:
        panels.append(_together(rows, tasks, metric))
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    width = max(3.6, 0.62 * sum(not row.is_control for row in rows) + 1.4)
    figure = Figure(figsize=(width * columns, 3.5 * lines + 0.3), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_levels(axes, [mark for mark in panel.marks if not mark.is_control], panel.errors)
        _draw_controls(axes, [mark for mark in panel.marks if mark.is_control])
        if all(mark.mean is None for mark in panel.marks):
            _say_empty(axes, _nothing(results))
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(axis)
        if axes in grid[::columns] or panel.measure != metric:
            axes.set_ylabel(panel.measure)
    _explain(figure, grid)
    if not results.others(axis).is_whole:
        figure.supxlabel(f"means {_OF_FINISHED}", fontsize=9)
    return figure


def _together(rows: Sequence[Row], tasks: Sequence[str | None], metric: str) -> _Panel:
    """The panel of all tasks: what the tables compare them by."""
    if any(row.kept is not None for row in rows) and not differ(rows):
        title = "of the teacher, with 95 % intervals"
        return _Panel(title, list(map(_kept, rows)), "share kept of the teacher", _INTERVAL)
    marks = [_scored(row, of_all_tasks(row.scores, tasks)) for row in rows]
    return _Panel("all tasks", marks, metric, _DEVIATION)


def _scored(row: Row, scores: Sequence[Score]) -> _Marks:
    mean = mean_over_seeds(scores)
    dots = [(v, f"{row.level}, seed {seed}: {v:.4g}") for seed, v in seed_means(scores).items()]
    said = f"{row.level}: {mean}"
    return _Marks(row.level, row.is_control, dots, mean.mean, mean.deviation, said)


def _kept(row: Row) -> _Marks:
    kept = row.kept
    if kept is None:
        return _Marks(row.level, row.is_control, [], None, None, "")
    dots = [(share, f"{row.level}, a seed: {share:.1%}") for share in kept.by_seed]
    low, high = kept.interval()
    said = f"{row.level}: {kept.mean:.1%} [{low:.1%}, {high:.1%}]"
    return _Marks(row.level, row.is_control, dots, kept.mean, high - kept.mean, said)


def _draw_controls(axes: Axes, controls: Sequence[_Marks]) -> None:
    """A line across for each, of its mean; no two look alike."""
    for number, control in enumerate(controls):
        if control.mean is not None:
            colours, style = divmod(number, len(_STYLES))
            rounds, colour = divmod(colours, len(_COLOURS))
            line = axes.axhline(
                control.mean,
                color=_COLOURS[colour],
                ls=_STYLES[style],
                lw=1.2 * (1 + rounds),
                label=plain(control.level),
            )
            say(line, [control.said])


def _draw_levels(axes: Axes, levels: Sequence[_Marks], errors: str) -> None:
    """Points with errors; numbers stand by their logarithm with a line, other levels beside."""
    places, numbers = _places([mark.level for mark in levels])
    for place, mark in zip(places, levels, strict=True):
        label = "seeds" if place == places[0] else None
        values = [value for value, _ in mark.dots]
        (dots,) = axes.plot([place] * len(values), values, ".", color=DOTS, ms=8, label=label)
        say(dots, [said for _, said in mark.dots])
    known = [(p, mark) for p, mark in zip(places, levels, strict=True) if mark.mean is not None]
    drawn = axes.errorbar(
        [p for p, _ in known],
        _numbers(mark.mean for _, mark in known),
        yerr=_numbers(mark.error for _, mark in known),
        fmt="o",
        color=POINT,
        capsize=4,
        ms=5,
        label=errors,
    )
    say(drawn.lines[0], [mark.said for _, mark in known])
    line = sorted((p, mark.mean or 0.0) for p, mark in known if p in numbers)
    axes.plot([p for p, _ in line], [mean for _, mean in line], color=POINT, lw=1)
    names = [plain(mark.level) for mark in levels]
    axes.set_xticks(places, names, rotation=30, ha="right", rotation_mode="anchor")
    axes.margins(x=0.1)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _places(levels: Sequence[str]) -> tuple[list[float], set[float]]:
    """Where levels stand on the x axis, and which of these are on a logarithmic scale."""
    numbers = {level: math.log10(number) for level in levels if (number := _positive(level))}
    if len(numbers) < 3:
        return [float(index) for index in range(len(levels))], set()
    ordered = sorted(numbers.values())
    gap = statistics.median(b - a for a, b in itertools.pairwise(ordered))
    places, beside = [], ordered[-1]
    for level in levels:
        if level not in numbers:
            beside += gap
        places.append(numbers.get(level, beside))
    return places, set(ordered)


def _positive(level: str) -> float | None:
    try:
        number = float(level)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def _map_plot(results: Results, one: str, two: str) -> Figure:
    """One panel a task: the mean of each combination of two axes' levels, written in its field."""
    rows, columns = results.levels(one), results.levels(two)
    tasks = results.plan.tasks
    size = (1.0 * len(columns) + 2.4, 0.55 * len(rows) + 1.6)
    across = min(len(tasks), 2)
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down + 0.3), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(grid, tasks, strict=False):
        found = results.cells(one, two, task)
        means = [mean_over_seeds(found.get((r, c), [])) for r in rows for c in columns]
        values = _numbers(mean.mean for mean in means).reshape(len(rows), len(columns))
        draw_map(axes, values, rows, columns, text=_form(means))
        axes.set(xlabel=two, ylabel=one)
        axes.set_title(task or "", fontsize=10)
        if np.isfinite(values).any():
            figure.colorbar(axes.images[0], ax=axes, label=plain(results.plan.spec.metric.path))
        else:
            _say_empty(axes, _nothing(results), y=False)
    whole = all(results.others(one, two, task=task).is_whole for task in tasks)
    figure.suptitle("mean over seeds" if whole else f"mean over seeds, {_OF_FINISHED}", fontsize=11)
    return figure


def _form(means: Iterable[Mean]) -> str:
    """How numbers beside each other are written: to two digits of what seeds make of most."""
    spreads = [mean.deviation for mean in means if mean.deviation]
    places = decimals(statistics.median(spreads)) if spreads else None
    return "{:z.4g}" if places is None else f"{{:z.{places}f}}"


def _search_plot(results: Results) -> Figure:
    """One panel an axis or space: the candidates' means and deviations over its values."""
    names = [*results.plan.axes, *results.plan.spec.spaces]
    spaces = results.plan.spec.spaces
    # what was stopped early has an average of something else
    points = [
        (row, mean_over_seeds(row.scores))
        for row in results.candidates()
        if row.scores and row.is_whole
    ]
    tasks = results.plan.tasks
    controls = [_scored(row, of_all_tasks(row.scores, tasks)) for row in results.controls()]
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.3), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, names, strict=False):
        drawn = axes.errorbar(
            _along(axes, [row.levels[name] for row, _ in points], _order(results, name)),
            _numbers(mean.mean for _, mean in points),
            yerr=_numbers(mean.deviation for _, mean in points),
            fmt="o",
            color=POINT,
            ecolor=DOTS,
            ms=5,
            label="candidates, mean ± standard deviation over seeds",
        )
        say(
            drawn.lines[0],
            [f"{row.level}, {name} {shown(row.levels[name])}: {mean}" for row, mean in points],
        )
        _draw_controls(axes, controls)
        if name in spaces and spaces[name].log:
            axes.set_xscale("log")
            # powers of ten have exponents too small to read
            axes.xaxis.set_major_formatter("{x:g}")
        if not points:
            _say_empty(axes, "no candidate is finished", y=all(c.mean is None for c in controls))
            axes.set_xticks([])
            axes.minorticks_off()
        axes.set_xlabel(name)
        if axes in grid[::columns]:
            axes.set_ylabel(plain(results.plan.spec.metric.path))
        axes.grid()
        axes.set_axisbelow(True)
    _explain(figure, grid)
    return figure


def _order(results: Results, name: str) -> Sequence[Level]:
    """The values of an axis or space in the order of the study's file, where it lists them."""
    if name in results.plan.axes:
        return list(results.plan.axes[name])
    return results.plan.spec.spaces[name].values or ()


def _along(axes: Axes, levels: Sequence[Level], order: Sequence[Level]) -> list[float]:
    """Where values stand on the x axis, which names them: numbers as they are, beside words each
    at a place of its own."""
    if not any(isinstance(level, str) for level in levels):
        if all(isinstance(level, int) for level in levels):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return [float(level) for level in levels]
    places = {level: n for n, level in enumerate(one for one in order if one in levels)}
    names = [plain(shortened(shown(level), _WORD)) for level in places]
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(names) - 0.5)
    return [float(places[level]) for level in levels]


def _importance_plot(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    names = list(dict.fromkeys(name for values in importances.values() for name in values))
    figure = Figure(figsize=(6.4, 0.5 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(importances)
    for index, (evaluator, values) in enumerate(importances.items()):
        places = [
            number + (index - (len(importances) - 1) / 2) * height for number in range(len(names))
        ]
        sizes, colour = [values.get(n, 0.0) for n in names], (POINT, REFERENCE)[index % 2]
        drawn = axes.barh(places, sizes, height * 0.9, color=colour, label=evaluator)
        for bar, name, size in zip(drawn, names, sizes, strict=True):
            say(bar, [f"{name}, {evaluator}: {size:.3f}"])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="importance", xlim=(0, 1))
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=len(importances), frameon=False)
    return figure


def _explain(figure: Figure, panels: Iterable[Axes]) -> None:
    """A legend of what stands in any panel, as wide as the figure: one may lack a control that
    others have."""
    drawn: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, handle)
    widest = max(map(len, drawn), default=0) * _CHARACTER + _LINE
    columns = max(1, min(len(drawn), int(figure.get_figwidth() / widest)))
    # there is room for one line
    further = max(0, -(-len(drawn) // columns) - 1)
    figure.set_figheight(figure.get_figheight() + further * _LINE_HEIGHT)
    place = "outside upper left"
    figure.legend(list(drawn.values()), list(drawn), loc=place, ncols=columns, frameon=False)


def _say_empty(axes: Axes, shown: str, *, y: bool = True) -> None:
    """Say why there is nothing; with `y` in the place of an axis around 0."""
    if y:
        axes.set_yticks([])
    axes.text(0.5, 0.5, shown, transform=axes.transAxes, ha="center", va="center", color=INK)


def _nothing(results: Results) -> str:
    """Why no mean is known."""
    if not any(record.value is not None for record in results.records):
        return "no run is finished"
    return "nothing to compare is finished"


def _of_task(scores: Sequence[Score], task: str | None) -> list[Score]:
    return [score for score in scores if score.task == task]


def _numbers(values: Iterable[float | None]) -> NDArray[np.float64]:
    """NaN where there is none."""
    return np.array([math.nan if value is None else value for value in values])
