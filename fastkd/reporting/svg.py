"""Line charts as inline SVG, drawn here: a run's report needs a few panels and no plotting library.

Text stays text, the same values give the same bytes, and nothing is loaded or run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastkd.reporting.html import escaped, shortened

# colours that stay apart for most of the colour-blind; a second round is dashed
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6b6b6b", "#a65628")
_REFERENCE = "#000000"
_COLUMNS = 2
# of one panel, in pixels
_WIDTH, _HEIGHT = 440.0, 290.0
_LEFT, _TOP, _BOTTOM, _RIGHT = 62.0, 30.0, 46.0, 14.0
_CHARACTER = 6.4
_LEGEND_LINE = 15.0
# no float32 is as large, and spans of these are finite
_LARGEST = 1e300
# fewer points than this are marked
_MARKED = 30


@dataclass(frozen=True)
class Line:
    """Values over steps."""

    label: str
    """Its name in the legend; text from anywhere."""
    x: Sequence[float]
    y: Sequence[float]
    """As long as `x`; one that the scale can't show leaves a gap."""
    reference: bool = False
    """Whether it is what the others are held against: black and dashed."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    lines: Sequence[Line]
    title: str = ""
    y_label: str = ""
    x_label: str = "step"
    log: bool = False
    """A logarithmic y axis; a linear one where no value is above 0."""
    legend: str | None = None
    """Heading of the legend; `None`: there is none."""


@dataclass(frozen=True)
class Axis:
    """Where values stand between 0 and 1, and the values that are named."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float | None:
        """Between 0 for the low end and 1 for the high one; `None`: it has no place."""
        if not _is_shown(value) or (self.log and value <= 0):
            return None
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)


def make_axis(values: Sequence[float], *, log: bool = False, margin: float = 0.05) -> Axis:
    """An axis around values, a little longer than they reach.

    Args:
        values: what is to be shown; those that are not finite, above 1e300, or not positive on a
            logarithmic axis are left out.
        log: logarithmic, if any value is positive.
        margin: what is added at either end, as a share of the whole.
    """
    shown = [value for value in values if _is_shown(value)]
    positive = [value for value in shown if value > 0]
    log = log and bool(positive)
    known = [math.log10(value) for value in positive] if log else shown or [0.0]
    low, high = min(known), max(known)
    room = (high - low) * margin or (0.05 if log else abs(low) / 10 or 0.5)
    low, high = low - room, high + room
    if not log:
        return Axis(low, high, False, _linear_ticks(low, high))
    low, high = 10 ** max(low, -307.0), 10 ** min(high, 308.0)
    return Axis(low, high, True, _log_ticks(low, high))


def _is_shown(value: float) -> bool:
    return abs(value) <= _LARGEST


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Four to nine multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return tuple(number * step for number in range(first, last + 1))


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
    """Panels side by side, as one element of HTML."""
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    width, height = columns * _WIDTH, rows * _HEIGHT
    body = []
    for number, panel in enumerate(panels):
        right, down = number % columns * _WIDTH, number // columns * _HEIGHT
        body += [f'<g transform="translate({right:g} {down:g})">', *_draw(panel), "</g>"]
    head = (
        f'<svg width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="none">'
    )
    return "\n".join([head, *body, "</svg>"])


def _draw(panel: Panel) -> list[str]:
    """The elements of a panel."""
    x_axis = make_axis([x for line in panel.lines for x in line.x])
    y_axis = make_axis([y for line in panel.lines for y in line.y], log=panel.log)
    left, right, top, bottom = (
        _LEFT,
        _WIDTH - _RIGHT - _legend_width(panel),
        _TOP,
        _HEIGHT - _BOTTOM,
    )
    middle = (left + right) / 2

    def across(x: float) -> float | None:
        place = x_axis.place(x)
        return None if place is None else left + place * (right - left)

    def up(y: float) -> float | None:
        place = y_axis.place(y)
        return None if place is None else bottom - place * (bottom - top)

    parts = []
    for tick in x_axis.ticks:
        at = across(tick)
        parts.append(f'<path d="M{at:.1f} {top:g}V{bottom:g}" stroke="#e4e4e4"/>')
        parts.append(_text(at or 0.0, bottom + 15, f"{tick:.10g}", "middle"))
    for tick in y_axis.ticks:
        at = up(tick)
        parts.append(f'<path d="M{left:g} {at:.1f}H{right:g}" stroke="#e4e4e4"/>')
        parts.append(_text(left - 5, (at or 0.0) + 4, f"{tick:.4g}", "end"))
    frame = f'x="{left:g}" y="{top:g}" width="{right - left:.1f}" height="{bottom - top:g}"'
    parts.append(f'<rect {frame} stroke="#888"/>')
    parts.append(_text(middle, top - 12, panel.title, "middle"))
    parts.append(_text(middle, bottom + 33, panel.x_label, "middle"))
    turned = f' transform="rotate(-90 13 {(top + bottom) / 2:g})"'
    parts.append(_text(13, (top + bottom) / 2, panel.y_label, "middle", turned))
    for number, line in enumerate(panel.lines):
        points = [(across(x), up(y)) for x, y in zip(line.x, line.y, strict=True)]
        parts += _curve(points, _stroke(number, line), line.label)
    return parts + _legend(panel, right + 10, top)


def _curve(
    points: Sequence[tuple[float | None, float | None]], stroke: str, label: str
) -> list[str]:
    """A line with gaps, and its points where there are few; a pointer that rests on it names it."""
    path, pen = [], "M"
    for x, y in points:
        if x is None or y is None:
            pen = "M"
            continue
        path.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    # a stroke of no length with round ends is a dot
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points if x is not None and y is not None)
    parts = [f'<path d="{"".join(path)}" stroke-width="1.5" {stroke}>{_title(label)}</path>']
    if len(points) < _MARKED:
        solid = stroke.split(" stroke-dasharray")[0]
        parts.append(f'<path d="{dots}" stroke-width="5" stroke-linecap="round" {solid}/>')
    return parts


def _stroke(number: int, line: Line) -> str:
    if line.reference:
        return f'stroke="{_REFERENCE}" stroke-dasharray="5 4"'
    colour = _COLOURS[number % len(_COLOURS)]
    dashes = ' stroke-dasharray="7 3"' if number // len(_COLOURS) % 2 else ""
    return f'stroke="{colour}"{dashes}'


def _legend_width(panel: Panel) -> float:
    if panel.legend is None:
        return 0.0
    names = [panel.legend, *(f"    {shortened(line.label)}" for line in panel.lines)]
    return min(max(map(len, names)) * _CHARACTER + 8, _WIDTH / 2)


def _legend(panel: Panel, left: float, top: float) -> list[str]:
    if panel.legend is None:
        return []
    parts = [_text(left, top + 8, panel.legend, "start")] if panel.legend else []
    for number, line in enumerate(panel.lines):
        at = top + 8 + (number + bool(panel.legend)) * _LEGEND_LINE
        stroke = _stroke(number, line)
        parts.append(f'<path d="M{left:g} {at - 4:g}h16" stroke-width="2" {stroke}/>')
        parts.append(_text(left + 21, at, line.label, "start"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222"'
    return f"<text {place}{more}>{escaped(shortened(text, 60))}</text>"


def _title(text: str) -> str:
    return f"<title>{escaped(text)}</title>"
