"""Pictures that studies and comparisons draw, with matplotlib of the extra `study`.

The report of a run has its own, `fastkd.reporting.svg`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastkd.errors import printable
from fastkd.reporting.html import shortened


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
    axes.imshow(values, aspect="auto", cmap=colours)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2 if np.isfinite(values).any() else 0.0
    axes.set_xticks(range(len(columns)), list(map(plain, columns)))
    if slanted:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), list(map(plain, rows)))
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                text.format(value),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < middle else "black",
            )


def plain(text: str) -> str:
    """Text from elsewhere as a label: short and printable, its dollar signs no formula."""
    return printable(shortened(text)).replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """The picture; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
