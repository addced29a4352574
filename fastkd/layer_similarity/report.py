"""What a comparison leaves behind: a table in the terminal, a CSV file, two pictures."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fastkd.errors import UserError
from fastkd.files.disk import write_whole
from fastkd.layer_map import CONVENTION
from fastkd.layer_similarity.cka import Matrix
from fastkd.layer_similarity.compare import Similarity
from fastkd.reporting.console import Reporter
from fastkd.reporting.plotting import draw_map, png

# where a map's mark stands in a field, and its shape
_MARKS = {"uniform": ("o", -0.34), "last": ("^", 0.0), "first": ("s", 0.34)}
# fewer tokens a feature let CKA of unrelated features rise above 0
_TOKENS_A_FEATURE = 10


@dataclass(frozen=True)
class _View:
    """One of the two measures, and how it is shown."""

    name: str
    values: Matrix
    first: int
    """Layer of the first row and column."""
    title: str
    form: str
    high: bool
    """Whether more is more alike."""

    def best(self, line: Matrix) -> int | None:
        """The column of the most similar layer, `None` where none can be compared."""
        if not np.isfinite(line).any():
            return None
        return int(np.nanargmax(line) if self.high else np.nanargmin(line))


def write_similarity(similarity: Similarity, folder: Path) -> None:
    """Write similarity.csv, cka.png and attention.png into a folder.

    Raises:
        UserError: the folder can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "similarity.csv", _csv(similarity))
        for view in _views(similarity):
            (folder / f"{view.name}.png").write_bytes(png(_figure(similarity, view)))
    except OSError as error:
        raise UserError(
            f"--output {folder} can't be used ({error.strerror}); give a folder that you may "
            "write to"
        ) from error


def print_similarity(similarity: Similarity, reporter: Reporter) -> None:
    """Print the best teacher layer of every student layer, beside those of three maps."""
    maps = similarity.maps()
    for view in _views(similarity):
        rows = []
        for layer, line in enumerate(view.values, start=view.first):
            targets = {name: found[layer - 1] if layer else 0 for name, found in maps.items()}
            cells = [view.best(line), *(target - view.first for target in targets.values())]
            shown = [
                "-" if at is None else f"{at + view.first}: {view.form.format(line[at])}"
                for at in cells
            ]
            rows.append([str(layer), *shown])
        reporter.table(view.title, ("student layer", "best teacher layer", *maps), rows)
    for note in notes(similarity):
        reporter.say(note)
    reporter.say(CONVENTION)


def notes(similarity: Similarity) -> list[str]:
    """What a reader must know about the numbers."""
    found = [f"measured on {similarity.tokens:,} tokens"]
    if similarity.relation_heads is not None:
        found.append(
            f"the student has {similarity.heads[0]} heads and the teacher {similarity.heads[1]}: "
            f"queries and keys of both are cut into {similarity.relation_heads} relation heads "
            "(MiniLMv2, arXiv 2012.15828)"
        )
    if similarity.tokens < _TOKENS_A_FEATURE * max(similarity.widths):
        found.append(
            f"few tokens for {max(similarity.widths)} features: CKA is too high, give more blocks"
        )
    if np.isnan(similarity.divergence).any():
        found.append("attention is compared only where both layers see equally far")
    return found


def _csv(similarity: Similarity) -> str:
    maps = similarity.maps()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    divergence = f"{similarity.kind}_divergence"
    writer.writerow(["student_layer", "teacher_layer", "linear_cka", divergence, *maps])
    for (student, teacher), value in np.ndenumerate(similarity.cka):
        blocks = student > 0 and teacher > 0
        attention = float(similarity.divergence[student - 1, teacher - 1]) if blocks else math.nan
        marked = [
            int(targets[student - 1] == teacher if student else teacher == 0)
            for targets in maps.values()
        ]
        cells = ["" if math.isnan(number) else number for number in (float(value), attention)]
        writer.writerow([student, teacher, *cells, *marked])
    return text.getvalue()


def _views(similarity: Similarity) -> tuple[_View, _View]:
    kind = similarity.kind
    bound = ", at most 0.693" if kind == "js" else ""
    return (
        _View("cka", similarity.cka, 0, "linear CKA of hidden states (1: alike)", "{:.3f}", True),
        _View(
            "attention",
            similarity.divergence,
            1,
            f"{kind} divergence of attention (0: alike{bound})",
            "{:.3f}",
            False,
        ),
    )


def _figure(similarity: Similarity, view: _View) -> Figure:
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
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _mark(axes: Axes, similarity: Similarity, view: _View) -> None:
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
