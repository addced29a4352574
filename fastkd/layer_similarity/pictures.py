"""Heat maps of a comparison, with matplotlib of the extra `study`."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fastkd.layer_similarity.compare import Similarity
from fastkd.layer_similarity.views import View
from fastkd.reporting.plotting import draw_map, themed

# where a map's mark stands in a field, and its shape
_MARKS = {"uniform": ("o", -0.34), "last": ("^", 0.0), "first": ("s", 0.34)}


@themed()
def draw_view(similarity: Similarity, view: View) -> Figure:
    """A heat map with the layers of three maps marked and the best of every row framed."""
    rows, columns = (
        [f"{n + view.first}" if n + view.first else "0" for n in range(size)]
        for size in view.values.shape
    )
    size = 0.72 * len(columns) + 2.4, 0.62 * len(rows) + 1.9
    figure = Figure(figsize=(max(size[0], 5.6), size[1]), layout="constrained")
    axes = figure.subplots()
    colours = "viridis" if view.high else "magma"
    draw_map(axes, view.values, rows, columns, text=view.form, colours=colours, slanted=False)
    embeddings = "" if view.first else " (0: embeddings)"
    axes.set(xlabel=f"teacher layer{embeddings}", ylabel="student layer")
    axes.set_title(view.title, fontsize=11)
    figure.colorbar(axes.images[0], ax=axes)
    _mark(axes, similarity, view)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return figure


def _mark(axes: Axes, similarity: Similarity, view: View) -> None:
    for name, targets in similarity.maps().items():
        layers = [(s, t) for s, t in enumerate(targets, start=1)]
        if not view.first:
            layers.insert(0, (0, 0))
        shape, shift = _MARKS[name]
        axes.scatter(
            [t - view.first + shift for _, t in layers],
            [s - view.first + 0.34 for s, _ in layers],
            marker=shape,
            s=26,
            facecolor="white",
            edgecolor="black",
            linewidth=0.8,
            label=name,
        )
    # what stands out from the colours of the map
    colour, label = "#e8483f" if view.high else "#19c3ff", "best of its row"
    for row, line in enumerate(view.values):
        column = view.best(line)
        if column is not None:
            place = column - 0.47, row - 0.47
            frame = Rectangle(place, 0.94, 0.94, fill=False, edgecolor=colour, lw=2, label=label)
            axes.add_patch(frame)
            # once in the legend
            label = "_"
