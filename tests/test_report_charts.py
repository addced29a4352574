"""Line charts of a report: a point stands where its value says, and nothing else is shown."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from fastkd.reporting.svg import Line, Panel, chart, make_axis

STEPS = (1.0, 2.0, 3.0, 4.0)


def curves(svg: str) -> list[list[tuple[float, float]]]:
    """The points of every curve, as they stand in the picture."""
    paths = [path.get("d", "") for path in ElementTree.fromstring(svg).iter("path") if len(path)]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", d)] for d in paths
    ]


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize("log", [False, True])
def test_a_point_stands_where_its_value_says(log: bool) -> None:
    values = (8.0, 2.0, 1.0, 4.0)
    (points,) = curves(chart([Panel([Line("", STEPS, values)], log=log)]))
    scaled = [math.log(value) if log else value for value in values]
    for (x, y), step, value in zip(points, STEPS, scaled, strict=True):
        # between the points of the smallest and the largest value
        across = (x - points[0][0]) / (points[3][0] - points[0][0])
        up = (y - points[2][1]) / (points[0][1] - points[2][1])
        assert across == pytest.approx((step - 1) / 3, abs=1e-3)
        assert up == pytest.approx((value - min(scaled)) / (max(scaled) - min(scaled)), abs=1e-3)
    # up is up
    assert points[0][1] < points[2][1]


def test_what_a_scale_can_not_show_is_a_gap() -> None:
    line = Line("x", (1, 2, 3, 4, 5), (1.0, 0.0, 2.0, math.nan, 3.0))
    svg = chart([Panel([line], log=True)])
    (points,) = curves(svg)
    assert len(points) == 3
    assert re.search(r'd="M[^L"]*M[^L"]*M[^L"]*" stroke-width="1.5"', svg)
    # without any value that it can show, the scale is linear
    (zeros,) = curves(chart([Panel([Line("x", STEPS, (0.0,) * 4)], log=True)]))
    assert len(zeros) == 4


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [0.0],
        [],
        [5.0, 5.0],
        [-3.0, 7.0],
        [1e-45, 3e38],
        [1.0, 1.0 + 1e-9],
        [-3e38, 3e38],
        [math.inf, math.nan, 2.0],
        [1e-300, 1e300],
        [0.123, 0.124],
        [11.6, 10.3, 9.9],
    ],
)
def test_an_axis_holds_its_values_and_names_some(values: list[float], log: bool) -> None:
    axis = make_axis(values, log=log)
    shown = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    places = [axis.place(value) for value in shown]
    assert all(place is not None and -1e-6 <= place <= 1 + 1e-6 for place in places)
    assert 2 <= len(axis.ticks) <= 10 and list(axis.ticks) == sorted(set(axis.ticks))
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


def test_ticks_are_round() -> None:
    assert make_axis([0.0, 10.0]).ticks == (0, 2, 4, 6, 8, 10)
    assert make_axis([1e-3, 1e2], log=True).ticks == pytest.approx((1e-3, 1e-2, 0.1, 1, 10, 100))
    assert make_axis([1.0, 60.0], log=True).ticks == pytest.approx((1, 2, 5, 10, 20, 50))
    assert make_axis([10.3, 11.9], log=True).ticks == pytest.approx((10.5, 11, 11.5))


def test_lines_are_named_and_no_name_is_markup() -> None:
    hostile = "</text><script>x</script>"
    lines = [Line(hostile, STEPS, STEPS), Line("teacher", STEPS, STEPS, reference=True)]
    svg = chart([Panel(lines, title="t", y_label="score", legend="layers")] * 3)
    assert texts(svg).count(hostile) == 3 and "<script" not in svg
    assert texts(svg).count("teacher") == texts(svg).count("score") == 3
    assert svg == chart([Panel(lines, title="t", y_label="score", legend="layers")] * 3)
    # two side by side, the third below
    assert 'viewBox="0 0 880 580"' in svg
    assert hostile not in texts(chart([Panel(lines)]))
