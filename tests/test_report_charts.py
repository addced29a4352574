"""Line charts of a report: a point stands where its value says, and nothing else is shown."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from fastkd.reporting import svg
from fastkd.reporting.layer_figure import layer_figures
from fastkd.reporting.numbers import number, tick_numbers
from fastkd.reporting.svg import CHARACTER, WIDTH, Bar, Line, Panel, bars, chart, make_axis

STEPS = (1.0, 2.0, 3.0, 4.0)


def elements(page: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(page).iter(tag))


def curves(page: str) -> list[list[tuple[float, float]]]:
    """The points of every curve, as they stand in the picture."""
    drawn = [path for path in elements(page, "path") if "line" in path.get("class", "").split()]
    paths = [path.get("d", "") for path in drawn if "dot" not in path.get("class", "")]
    # those of legends begin at a place that no curve has
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", d)]
        for d in paths
        if d != "M1 5H21"
    ]


def told(page: str) -> list[list[str]]:
    """What a pointer is told at each place, line by line."""
    bands = [rect for rect in elements(page, "rect") if rect.get("class") == "band"]
    return [(band.findtext("title") or "").splitlines() for band in bands]


def texts(svg: str) -> list[str]:
    tags = ("text", "figcaption", "li")
    return ["".join(one.itertext()) for tag in tags for one in elements(svg, tag)]


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
    line = Line("x", (1, 2, 3, 4, 5), (1.0, math.nan, 2.0, math.inf, 3.0))
    svg = chart([Panel([line], log=True)])
    (points,) = curves(svg)
    assert len(points) == 3
    assert re.search(r'class="line line-0" d="M[^L"]*M[^L"]*M[^L"]*"', svg)
    assert told(svg) == [
        *(["step 1", "x: 1"], ["step 2"], ["step 3", "x: 2"], ["step 4"], ["step 5", "x: 3"]),
    ]


@pytest.mark.parametrize("values", [(0.0,) * 4, (4.0, 0.0, 2.0, 1.0), (1.0, 2.0, -3.0, 4.0)])
def test_a_panel_of_values_without_a_logarithm_is_linear(values: tuple[float, ...]) -> None:
    page = chart([Panel([Line("x", STEPS, values)], "loss", log=True)])
    (points,) = curves(page)
    assert len(points) == 4 and not any("logarithmic" in text for text in texts(page))
    heights = [-y for _, y in points]
    shares = [(v - min(values)) / (max(values) - min(values) or 1) for v in values]
    for height, share in zip(heights, shares, strict=True):
        expected = min(heights) + share * (max(heights) - min(heights))
        assert height == pytest.approx(expected, abs=0.11)


def test_a_panel_says_that_it_is_logarithmic() -> None:
    page = chart([Panel([Line("x", STEPS, (4, 3, 2, 1))], "loss", log=True)])
    assert "loss, logarithmic" in texts(page)
    assert 'aria-label="loss, logarithmic by step: x' in page


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
    shown = [v for v in values if math.isfinite(v)]
    assert axis.log == (log and bool(shown) and min(shown) > 0)
    places = [axis.place(value) for value in shown]
    assert all(place is not None and -1e-6 <= place <= 1 + 1e-6 for place in places)
    assert 2 <= len(axis.ticks) <= 10 and list(axis.ticks) == sorted(set(axis.ticks))
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


def test_ticks_are_round() -> None:
    assert make_axis([0.0, 10.0]).ticks == (0, 2, 4, 6, 8, 10)
    # of values that are all alike as much room as they are large
    for value, room in ((2000.0, 200.0), (-0.01, 0.001), (0.0, 0.5)):
        flat = make_axis([value, value])
        assert (flat.low, flat.high) == (value - room, value + room)
    assert make_axis([1e-3, 1e2], log=True).ticks == pytest.approx((1e-3, 1e-2, 0.1, 1, 10, 100))
    assert make_axis([1.0, 60.0], log=True).ticks == pytest.approx((1, 2, 5, 10, 20, 50))
    assert make_axis([10.3, 11.9], log=True).ticks == pytest.approx((10.5, 11, 11.5))


def test_lines_are_named_and_no_name_is_markup() -> None:
    hostile = "</text><script>x</script>"
    lines = [Line(hostile, STEPS, STEPS), Line("teacher", STEPS, STEPS, reference=True)]
    page = chart([Panel(lines, title="t", legend="layers")] * 3)
    assert texts(page).count(hostile) == 3 and "<script" not in page
    assert texts(page).count("teacher") == texts(page).count("t") == 3
    assert page == chart([Panel(lines, title="t", legend="layers")] * 3)
    assert hostile not in texts(chart([Panel(lines)]))
    assert told(page)[0] == ["step 1", f"{hostile}: 1", "teacher: 1"]
    # also for who sees no picture
    said = [svg.get("aria-label") for svg in elements(page, "svg") if svg.get("role") == "img"]
    assert len(said) == 3 and f"{hostile} from 1 at 1 to 4 at 4; teacher from 1" in str(said[0])


@pytest.mark.parametrize("steps", [240, 241, 5000])
def test_a_long_run_keeps_its_extremes_and_every_value_is_inside_what_is_told(steps: int) -> None:
    x = [10.0 * n for n in range(1, steps + 1)]
    y = [1.0 + 0.5 * math.sin(n) for n in range(steps)]
    y[steps // 3], y[steps // 2] = 9.0, 0.01
    page = chart([Panel([Line("a", x, y)], log=True)])
    (points,), bands = curves(page), told(page)
    assert len(bands) <= 240 and len(points) <= 480
    top, bottom = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
    assert len([p for p in points if p[1] == top[1]]) == 1 and top[0] < bottom[0]
    number, found = 0, []
    for where, value in bands:
        first, _, last = where.removeprefix("step ").replace(",", "").partition(" to ")
        low, _, high = value.removeprefix("a: ").partition(" to ")
        while number < steps and x[number] <= float(last or first):
            assert float(low) - 1e-3 <= y[number] <= float(high or low) + 1e-3
            number += 1
        found += [low, high]
    assert number == steps and {"9", "0.01"} <= set(found)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((0.0, "0"), (12345.6, "12,346"), (0.00001, "1e-5"), (1e12, "1e12"), (-0.25, "-0.25")),
        *((0.123456, "0.1235"), (999.99, "1000"), (2e-7, "2e-7"), (1e9, "1e9"), (math.nan, "nan")),
    ],
)
def test_a_number_has_four_digits(value: float, said: str) -> None:
    assert number(value) == said


@pytest.mark.parametrize(
    ("ticks", "shown"),
    [
        ((0.89272, 0.89274, 0.89276), ["0.89272", "0.89274", "0.89276"]),
        ((2.3701, 2.37015, 2.3702), ["2.3701", "2.37015", "2.3702"]),
        ((12345.2, 12345.4), ["12,345.2", "12,345.4"]),
        ((999.8, 1000.0, 1000.2), ["999.8", "1,000", "1,000.2"]),
        ((0.9999999998, 1.0), ["0.9999999998", "1"]),
        ((1e-5, 1e-3, 0.1), ["1e-5", "0.001", "0.1"]),
        ((2_000_000.0, 2_000_005.0), ["2,000,000", "2,000,005"]),
        ((0.1 + 0.2, 0.4), ["0.3", "0.4"]),
        ((1.0, math.nextafter(1.0, 2.0)), ["1", "1.0000000000000002"]),
        ((1 / 3,), ["0.3333"]),
    ],
)
def test_ticks_have_the_digits_that_tell_them_apart(
    ticks: tuple[float, ...], shown: list[str]
) -> None:
    assert tick_numbers(ticks) == shown


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [(0.89271, 0.89278), (2.37011, 2.37035), (12345.2, 12345.9)])
def test_an_axis_names_no_two_places_alike(values: tuple[float, ...], log: bool) -> None:
    page = chart([Panel([Line("", (1, 2), values)], log=log)])
    named = [text for text in texts(page) if re.fullmatch(r"[\d,]+\.\d+", text)]
    assert len(named) >= 3 and len(set(named)) == len(named)


def test_what_is_said_of_a_line_begins_and_ends_with_numbers() -> None:
    line = Line("norm", (10, 20, 30, 40), (math.nan, 3.0, 2.0, math.inf))
    page = chart([Panel([line], "t"), Panel([Line("x", (1,), (math.nan,))], "t")])
    said = [svg.get("aria-label") for svg in elements(page, "svg") if svg.get("role") == "img"]
    assert said == ["t by step: norm from 3 at 20 to 2 at 30", "t by step: x without values"]


def test_steps_have_no_fractions() -> None:
    page = chart([Panel([Line("", (0, 1, 2), (1, 2, 3))])])
    assert {"0", "1", "2"} <= set(texts(page)) and "0.5" not in texts(page)


@pytest.mark.parametrize("end", [20_000, 99_999, 150_000, 1_000_000, 2_000_000, 9_999_999])
def test_no_label_of_a_step_is_cut(end: int) -> None:
    page = chart([Panel([Line("", (0, end // 2, end), (1.0, 2.0, 3.0))])])
    for label in elements(page, "text"):
        if label.get("text-anchor") == "middle":
            half = len(label.text or "") * CHARACTER / 2
            assert float(label.get("x", "")) - half >= 0, label.text
            assert float(label.get("x", "")) + half <= WIDTH, label.text


def test_no_value_of_a_long_run_is_formatted_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    formatted: list[float] = []
    monkeypatch.setattr(svg, "number", lambda x: formatted.append(x) or number(x))
    steps = tuple(range(1, 20_001))
    lines = [Line(str(n), steps, tuple(n / step for step in steps)) for n in range(1, 4)]
    chart([Panel(lines)])
    assert 0 < len(formatted) < 4000


def test_bars_are_as_long_as_what_they_say() -> None:
    page = bars("memory", [Bar("weights", 40.0, "40 MiB"), Bar("<b>", 10.0, "10 MiB")])
    rects = elements(page, "rect")
    long, short = (float(rect.get("width", "")) for rect in rects)
    assert long == pytest.approx(4 * short, abs=0.2)
    assert [rect.findtext("title") for rect in rects] == ["weights: 40 MiB", "<b>: 10 MiB"]
    assert "b>" not in page.replace("&lt;b&gt;", "")


LABELS = ("attention/1-2", "attention/2-4", "hidden/1-2", "hidden/2-4", "embedding/0-0", "labels")


def links(page: str) -> list[str]:
    paths = [path for path in elements(page, "path") if path.get("class") == "link"]
    return [path.findtext("title") or "" for path in paths]


def test_layers_that_terms_share_are_drawn_once() -> None:
    weights = {"attention/1-2": 1.0, "hidden/1-2": 10.0}
    (page,) = layer_figures(LABELS, weights, (2, 4))
    assert links(page) == [
        "student layer 0 from teacher layer 0",
        "student layer 1 from teacher layer 2, weight in attention 1, weight in hidden 10",
        "student layer 2 from teacher layer 4",
    ]
    kinds = [circle.get("class") for circle in elements(page, "circle")]
    # three layers of the student with the embeddings, of the teacher two that are not compared
    assert kinds == ["node"] * 3 + ["node", "unused", "node", "unused", "node"]
    assert texts(page)[-1] == "embedding, attention, hidden"


def test_several_teacher_layers_are_drawn_with_their_weights() -> None:
    labels = [f"hidden/{s}-{t}" for s in (1, 2) for t in (1, 2, 3)]
    weights = {label: 0.1 * n for n, label in enumerate(labels, start=1)}
    drawn, table = layer_figures(labels, weights, (2, 3))
    paths = [path for path in elements(drawn, "path") if path.get("class") == "link"]
    widths = [float(path.get("stroke-width", "")) for path in paths]
    assert widths == sorted(widths) and widths[-1] == 4.0 and len(links(drawn)) == 6
    cells = [cell.text for cell in elements(table, "td")]
    assert cells == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6"]
    # a mean of several is one loss; another mapping is another figure
    mean, drawn_anew = layer_figures(["hidden/1-1..3", "norms/1-*"], {}, None)
    assert links(mean) == ["student layer 1 from teacher layers together 1 to 3"] * 3
    assert links(drawn_anew) == [] and "drawn anew" in drawn_anew
    assert layer_figures(["logits", "labels"], {}, None) == []
