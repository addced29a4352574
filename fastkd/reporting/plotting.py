"""Pictures that studies and comparisons draw, with matplotlib of the extra `study`.

Beside a page they are PNGs on white; in it they are SVGs in the colours of its style sheet. The
report of a run has its own, `fastkd.reporting.svg`.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.text import Text
from numpy.typing import NDArray

from fastkd.errors import printable
from fastkd.reporting.html import shortened

# of ink, lines and points of a figure; a page puts its own in their place
INK, RULE, POINT, DOTS, REFERENCE = "#1c2025", "#d8dde4", "#1e49b8", "#2f8bb0", "#c8500b"
_OF_THE_PAGE = {
    INK: "ink",
    RULE: "rule",
    POINT: "line-0",
    DOTS: "line-2",
    REFERENCE: "line-1",
}
# black itself is left out of an SVG, where the page has a colour of its own for texts
_BLACK = "#000001"
_SAYS, _ON = "says ", "on "
# of matplotlib
_UPRIGHT = ("normal", 400)
_GLYPH = re.compile(r"Glyph (\d+) .*missing from font")
_METADATA = ("Creator", "Date", "Format", "Type")
_SVG = "{http://www.w3.org/2000/svg}"
ElementTree.register_namespace("", _SVG[1:-1])
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def draw_map(
    axes: Axes,
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    text: str = "{:.3f}",
    colours: str = "viridis",
    slanted: bool = True,
) -> None:
    """A heat map with every value written in its field; a field without one stays empty.

    Args:
        axes: to draw on.
        values: [rows, columns], NaN where there is none.
        rows: names from top to bottom.
        columns: names from left to right.
        text: format of a value.
        colours: a colour map of matplotlib that goes from dark to light.
        slanted: whether the columns' names need the room.
    """
    fields = axes.imshow(values, aspect="auto", cmap=colours)
    axes.set_xticks(range(len(columns)), list(map(plain, columns)))
    if slanted:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), list(map(plain, rows)))
    grounds = fields.to_rgba(values)[..., :3]
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ground = grounds[row, column]
            axes.text(
                column,
                row,
                text.format(value),
                ha="center",
                va="center",
                fontsize=8,
                # what stands out more, see `_luminance`
                color="white" if _luminance(ground) < 0.179 else _BLACK,
                gid=_ON + to_hex(ground),
            )


def _luminance(colour: NDArray[np.float64]) -> float:
    """Relative luminance of sRGB in 0..1 (WCAG 2.2); at 0.179 black and white contrast alike."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def plain(text: str) -> str:
    """Text from elsewhere as a label: short and printable, its dollar signs no formula."""
    return printable(shortened(text)).replace("$", r"\$")


def png(figure: Figure) -> tuple[bytes, frozenset[str]]:
    """The picture, and the characters that stand in it as boxes, as no font here has them; the same
    figure gives the same bytes, and keeps its layout from then on."""
    picture, missing = _drawn(figure)
    if missing and _give_fonts(figure, missing):
        picture, missing = _drawn(figure)
    # another one would be much the same, and takes longer than drawing
    figure.set_layout_engine("none")
    return picture, missing


def _drawn(figure: Figure) -> tuple[bytes, frozenset[str]]:
    buffer = io.BytesIO()
    with _noting_glyphs() as missing:
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue(), frozenset(missing)


@contextmanager
def _noting_glyphs() -> Iterator[set[str]]:
    """Collect the characters that a figure's fonts lack, in the place of a warning of each."""
    missing: set[str] = set()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield missing
    for one in found:
        glyph = _GLYPH.match(str(one.message))
        if glyph is None:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        else:
            missing.add(chr(int(glyph[1])))


def _give_fonts(figure: Figure, missing: Iterable[str]) -> bool:
    """Let the texts of a figure fall back on fonts that have characters which theirs lack; whether
    there are any."""
    rest, families = set(map(ord, missing)), []
    upright = {f.name: f.fname for f in fontManager.ttflist if (f.style, f.weight) == _UPRIGHT}
    for name, path in sorted(upright.items()):
        # the last resort has a box for every character
        if rest and not name.startswith("Last Resort"):
            known = get_font(path).get_charmap().keys()
            if rest & known:
                families.append(name)
                rest -= known
    for text in figure.findobj(Text) if families else ():
        text.set_fontfamily([text.get_fontname(), *families])
    return bool(families)


@contextmanager
def themed() -> Iterator[None]:
    """Draw in colours that `inline_svg` turns into those of the page's mode."""
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    colours = {**dict.fromkeys(names, INK), "axes.facecolor": "none", "grid.color": RULE}
    with matplotlib.rc_context({**colours, "legend.labelcolor": INK}):
        yield


def say(artist: Artist, shown: Sequence[str]) -> None:
    """Give the marks of an artist what a pointer that rests on them is told, one text each."""
    artist.set_gid(_SAYS + json.dumps(list(shown)))


def inline_svg(figure: Figure, title: str) -> str:
    """A figure as an element of HTML that follows the page's mode, loads nothing, and names the
    values that `say` gave; the same figure gives the same text.

    Args:
        figure: made inside `themed`.
        title: what is said of it to those who don't see it.
    """
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "svg.image_inline": True}
    # a browser has fonts of its own
    with matplotlib.rc_context(settings), _noting_glyphs():
        figure.savefig(buffer, format="svg", facecolor="none", metadata=dict.fromkeys(_METADATA))
    tree = ElementTree.fromstring(buffer.getvalue())
    for name in ("metadata", "defs"):
        # rights of nobody; and a rule that would hold for the whole page
        for found in tree.findall(f"{_SVG}{name}"):
            tree.remove(found)
    tree.set("role", "img")
    tree.set("aria-label", printable(title))
    tree.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for group in list(tree.iter(f"{_SVG}g")):
        _tell(group)
    text = ElementTree.tostring(tree, encoding="unicode")
    for colour, name in _OF_THE_PAGE.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def _tell(group: ElementTree.Element) -> None:
    """Put what `say` gave a group to its marks, and what a text stands on to the text; other names
    would stand twice in a page."""
    name = group.attrib.pop("id", "")
    if name.startswith(_ON):
        group.set("data-ground", name.removeprefix(_ON))
    if not name.startswith(_SAYS):
        return
    shown = json.loads(name.removeprefix(_SAYS))
    marks = [mark for mark in group.iter() if mark.tag == f"{_SVG}use"] or group.findall(
        f"{_SVG}path"
    )
    assert len(marks) == len(shown), "one text a mark"
    for mark, told in zip(marks, shown, strict=True):
        ElementTree.SubElement(mark, f"{_SVG}title").text = printable(told)
