"""Charts as inline SVG, drawn here: a report needs a few panels and no plotting library.

Text stays text, the same values give the same bytes, and nothing is loaded or run: colours are
those of the page's style sheet, in its light or dark mode, and a pointer that rests on a step is
told the values of all lines there.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastkd.reporting.html import escaped, shortened
from fastkd.reporting.numbers import number, tick_numbers
from fastkd.reporting.style import LINES

# of one panel, in pixels; the page shows it at about this size
WIDTH = 360.0
_HEIGHT = 220.0
_TOP, _BOTTOM, _RIGHT = 8.0, 40.0, 10.0
CHARACTER = 7.6
_BAR = 26.0
Point = tuple[float, float]
# no float32 is as large, and spans of these are finite
_LARGEST = 1e300
# fewer points than this are marked
_MARKED = 30
# a panel has no more places that a pointer can tell apart
_PLACES = 240
_DASHES = 3


@dataclass(frozen=True)
class Line:
    """Values over steps."""

    label: str
    """Its name; text from anywhere."""
    x: Sequence[float]
    y: Sequence[float]
    """As long as `x`; one that the scale can't show leaves a gap."""
    reference: bool = False
    """Whether it is what the others are held against: dotted."""
    group: str | None = None
    """Lines of one group look alike and have one entry of the legend."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    lines: Sequence[Line]
    title: str = ""
    x_label: str = "step"
    log: bool = False
    """A logarithmic y axis; a linear one where a value is 0 or below."""
    legend: str | None = None
    """Heading of the legend; `None`: there is none."""


@dataclass(frozen=True)
class Bar:
    """One bar of a chart of bars."""

    label: str
    size: float
    """Not negative."""
    said: str
    """The size as text, with its unit."""


@dataclass(frozen=True)
class Axis:
    """Where values stand between 0 and 1, and the values that are named."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float | None:
        """Between 0 for the low end and 1 for the high one; `None`: it has no place."""
        if not _is_shown(value):
            return None
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)


def make_axis(
    values: Sequence[float],
    *,
    log: bool = False,
    margin: float = 0.05,
    parts: int = 6,
    whole: bool = False,
) -> Axis:
    """An axis around values, a little longer than they reach.

    Args:
        values: what is to be shown; those that are not finite or above 1e300 are left out.
        log: logarithmic, if all values are positive: what has no place there would be missing.
        margin: what is added at either end, as a share of the whole.
        parts: about as many ticks there are, linearly.
        whole: whether values between whole numbers have no tick.
    """
    shown = [value for value in values if _is_shown(value)]
    log = log and bool(shown) and min(shown) > 0
    known = [math.log10(value) for value in shown] if log else shown or [0.0]
    low, high = min(known), max(known)
    room = (high - low) * margin or (0.05 if log else abs(low) / 10 or 0.5)
    low, high = low - room, high + room
    if not log:
        return Axis(low, high, False, _linear_ticks(low, high, parts, whole))
    low, high = 10 ** max(low, -307.0), 10 ** min(high, 308.0)
    return Axis(low, high, True, _log_ticks(low, high))


def _is_shown(value: float) -> bool:
    return abs(value) <= _LARGEST


def _linear_ticks(
    low: float, high: float, parts: int = 6, whole: bool = False
) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten, of six parts four to nine."""
    rough = max((high - low) / parts, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    # neighbours nearer than floats can be are one
    return tuple(dict.fromkeys(number * step for number in range(first, last + 1)))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten; with their multiples where there are few of them, or as on a linear axis."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    stride = max(1, -(-(last - first) // 6))
    for factors in ((1,), (1, 2, 5)):
        powers = range(-(-first // stride) * stride, last + 1, stride)
        ticks = [f * 10.0**p for p in powers for f in factors]
        shown = tuple(tick for tick in ticks if low <= tick <= high)
        if len(shown) >= 3:
            return shown
    return tuple(tick for tick in _linear_ticks(low, high) if tick > 0)


def chart(panels: Sequence[Panel]) -> str:
    """Panels beside and below each other, as one element of HTML."""
    return "\n".join(["<div class='panels'>", *map(_figure, panels), "</div>"])


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Bars below each other, as one figure of HTML."""
    names = [shortened(row.label, 24) for row in rows]
    left = max(map(len, names)) * CHARACTER + 8
    longest = max(len(row.said) for row in rows) * CHARACTER + 8
    room = WIDTH - left - longest
    largest = max(row.size for row in rows) or 1.0
    parts = []
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        top, width = place * _BAR, max(row.size / largest * room, 1.0)
        parts += [
            text(left - 8, top + 17, name, "end"),
            f'<rect class="bar" x="{left:.1f}" y="{top + 4:g}" width="{width:.1f}" '
            f'height="{_BAR - 8:g}">{tooltip(f"{row.label}: {row.said}")}</rect>',
            text(left + width + 6, top + 17, row.said, "start"),
        ]
    said = "; ".join(f"{row.label} {row.said}" for row in rows)
    return figure(title, picture(len(rows) * _BAR, parts, f"{title}: {said}"))


def figure(title: str, content: str) -> str:
    """A figure with a title above."""
    return f"<figure><figcaption>{escaped(title)}</figcaption>{content}</figure>"


def picture(height: float, parts: Sequence[str], said: str) -> str:
    """An SVG of some height, and what is said of it to those who don't see it."""
    head = f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escaped(said)}">'
    return "\n".join([head, *parts, "</svg>"])


def text(x: float, y: float, shown: str, anchor: str, kind: str = "") -> str:
    """A text of a picture."""
    marked = f' class="{kind}"' if kind else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{marked}'
    return f"<text {place}>{escaped(shortened(shown, 60))}</text>"


def tooltip(shown: str) -> str:
    """What a pointer that rests on the element around it is told."""
    return f"<title>{escaped(shown)}</title>"


def _figure(panel: Panel) -> str:
    said = "; ".join(map(_said, panel.lines[:_MARKED]))
    y_axis = make_axis([y for line in panel.lines for y in line.y], log=panel.log)
    title = ", ".join(filter(None, (panel.title, "logarithmic" if y_axis.log else "")))
    drawn = picture(_HEIGHT, _draw(panel, y_axis), f"{title} by {panel.x_label}: {said}")
    return figure(title, drawn + _legend(panel))


def _said(line: Line) -> str:
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if _is_shown(y)]
    if not known:
        return f"{line.label} without values".lstrip()
    ends = (f"{number(y)} at {number(x)}" for x, y in (known[0], known[-1]))
    return f"{line.label} from {' to '.join(ends)}".lstrip()


def _draw(panel: Panel, y_axis: Axis) -> list[str]:
    """The elements of a panel."""
    # lines of a run have the same x, of which there may be very many
    places = tuple(dict.fromkeys(x for line in panel.lines for x in line.x))
    parts = 6 if all(len(number(x)) < 4 for x in places) else 4
    x_axis = make_axis(places, margin=0.02, parts=parts, whole=True)
    y_numbers, x_numbers = tick_numbers(y_axis.ticks), tick_numbers(x_axis.ticks)
    # a tick may stand at either end, and its label reaches beyond
    halves = [len(shown) * CHARACTER / 2 for shown in x_numbers]
    left = max(max(map(len, y_numbers)) * CHARACTER + 12, *halves[:1])
    right, bottom = WIDTH - max(_RIGHT, *halves[-1:]), _HEIGHT - _BOTTOM

    def across(x: float) -> float | None:
        place = x_axis.place(x)
        return None if place is None else left + place * (right - left)

    def up(y: float) -> float | None:
        place = y_axis.place(y)
        return None if place is None else bottom - place * (bottom - _TOP)

    found = []
    for tick, shown in zip(y_axis.ticks, y_numbers, strict=True):
        at = up(tick) or 0.0
        found.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:g}"/>')
        found.append(text(left - 6, at + 4, shown, "end"))
    for tick, shown in zip(x_axis.ticks, x_numbers, strict=True):
        at = across(tick) or 0.0
        found.append(f'<path class="axis" d="M{at:.1f} {bottom:g}v4"/>')
        found.append(text(at, bottom + 17, shown, "middle"))
    found.append(f'<path class="axis" d="M{left:.1f} {bottom:g}H{right:g}"/>')
    found.append(text((left + right) / 2, _HEIGHT - 5, panel.x_label, "middle"))
    groups = _groups(places)
    found += _bands(panel, groups, across, (left, right))
    for line, looks in zip(panel.lines, _looks(panel.lines), strict=True):
        points = [(across(x), up(y)) for x, y in _thinned(line, groups)]
        found += _curve(points, looks)
    return found


def _groups(places: Sequence[float]) -> list[tuple[float, float]]:
    """First and last x of neighbours that are one place for a pointer."""
    known = sorted({x for x in places if _is_shown(x)})
    size = max(1, -(-len(known) // _PLACES))
    return [(known[n], known[min(n + size, len(known)) - 1]) for n in range(0, len(known), size)]


def _by_place(line: Line, groups: Sequence[tuple[float, float]]) -> list[list[Point]]:
    """The points of a line, one list a place."""
    lasts = [last for _, last in groups]
    found: list[list[Point]] = [[] for _ in groups]
    for x, y in zip(line.x, line.y, strict=True):
        if _is_shown(x):
            found[bisect_left(lasts, x)].append((x, y))
    return found


def _thinned(line: Line, groups: Sequence[tuple[float, float]]) -> list[Point]:
    """The points of a line; of neighbours that fall together the least and the largest."""
    if all(first == last for first, last in groups):
        return list(zip(line.x, line.y, strict=True))
    found = []
    for points in filter(None, _by_place(line, groups)):
        found += sorted({min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])})
    return found


def _bands(
    panel: Panel,
    groups: Sequence[tuple[float, float]],
    across: Callable[[float], float | None],
    ends: tuple[float, float],
) -> list[str]:
    """Parts of the panel that tell a pointer the values there, one a place."""
    middles = [((across(a) or 0.0) + (across(b) or 0.0)) / 2 for a, b in groups]
    borders = [ends[0], *((a + b) / 2 for a, b in itertools.pairwise(middles)), ends[1]]
    by_place = zip(*(_by_place(line, groups) for line in panel.lines), strict=True)
    found = []
    for group, inside, edges in zip(groups, by_place, itertools.pairwise(borders), strict=True):
        (left, right), named = edges, zip(panel.lines, inside, strict=True)
        told = [_told(line.label, [y for _, y in points]) for line, points in named]
        where = " to ".join(number(x) for x in dict.fromkeys(group))
        shown = "\n".join([f"{panel.x_label} {where}", *(one for one in told if one)])
        found.append(
            f'<rect class="band" x="{left:.1f}" y="{_TOP:g}" width="{right - left:.1f}" '
            f'height="{_HEIGHT - _BOTTOM - _TOP:g}">{tooltip(shown)}</rect>'
        )
    return found


def _told(label: str, values: Sequence[float]) -> str:
    """What a line is at a place, or from what to what it goes there."""
    shown = [value for value in values if _is_shown(value)]
    if not shown:
        return ""
    ends = dict.fromkeys(number(end) for end in (min(shown), max(shown)))
    return (f"{label}: " if label else "") + " to ".join(ends)


def _curve(points: Sequence[tuple[float | None, float | None]], looks: str) -> list[str]:
    """A line with gaps, and its points where there are few."""
    path, pen = [], "M"
    for x, y in points:
        if x is None or y is None:
            pen = "M"
            continue
        path.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    # a stroke of no length with round ends is a dot
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points if x is not None and y is not None)
    parts = [f'<path class="line {looks}" d="{"".join(path)}"/>']
    if len(points) < _MARKED and "reference" not in looks:
        parts.append(f'<path class="line dot {looks.split(" ")[0]}" d="{dots}"/>')
    return parts


def _looks(lines: Sequence[Line]) -> list[str]:
    """Classes of the lines; each group has a colour, and further rounds of colours are dashed."""
    groups: dict[str | int, int] = {}
    found = []
    for own, line in enumerate(lines):
        if line.reference:
            found.append("reference")
            continue
        place = groups.setdefault(own if line.group is None else line.group, len(groups))
        dashes = place // LINES % _DASHES
        found.append(f"line-{place % LINES}" + (f" dash-{dashes}" if dashes else ""))
    return found


def _legend(panel: Panel) -> str:
    if panel.legend is None:
        return ""
    entries = {
        line.label if line.group is None else line.group: looks
        for line, looks in zip(panel.lines, _looks(panel.lines), strict=True)
    }
    heading = f"<li>{escaped(panel.legend)}</li>" if panel.legend else ""
    swatch = '<svg viewBox="0 0 22 10" aria-hidden="true"><path class="line {}" d="M1 5H21"/></svg>'
    items = "".join(
        f"<li>{swatch.format(looks)}{escaped(shortened(label))}</li>"
        for label, looks in entries.items()
    )
    return f"<ul class='legend'>{heading}{items}</ul>"
