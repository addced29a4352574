"""What a comparison leaves behind: a table in the terminal, a CSV file, two pictures, a page."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np

from fastkd.errors import UserError
from fastkd.extras import need
from fastkd.files.disk import write_whole
from fastkd.layer_map import CONVENTION
from fastkd.layer_similarity.compare import Similarity
from fastkd.layer_similarity.views import View, views
from fastkd.reporting.console import Reporter
from fastkd.reporting.html import document, escaped, html_table, scrolling

# fewer tokens a feature let CKA of unrelated features rise above 0
_TOKENS_A_FEATURE = 10


def write_similarity(similarity: Similarity, folder: Path) -> None:
    """Write similarity.csv, cka.png and attention.png into a folder, and similarity.html with all
    of it, which needs nothing beside it.

    Raises:
        UserError: matplotlib is not installed, or the folder can't be written to.
    """
    need("a picture of layers", "study", "matplotlib")
    from fastkd.layer_similarity.pictures import draw_view
    from fastkd.reporting.plotting import inline_svg, png

    parts = [f"<p>{escaped(note)}</p>" for note in (*notes(similarity), CONVENTION)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "similarity.csv", _csv(similarity))
        for view in views(similarity):
            figure = draw_view(similarity, view)
            (folder / f"{view.name}.png").write_bytes(png(figure)[0])
            drawn = scrolling(inline_svg(figure, view.title), view.title)
            table = html_table(*_best(similarity, view), view.title)
            parts += [f"<h2>{escaped(view.title)}</h2>", table, f"<figure>{drawn}</figure>"]
        write_whole(folder / "similarity.html", document("Layers, student and teacher", parts))
    except OSError as error:
        raise UserError(
            f"--output {folder} can't be used ({error.strerror}); give a folder that you may "
            "write to"
        ) from error


def print_similarity(similarity: Similarity, reporter: Reporter) -> None:
    """Print the best teacher layer of every student layer, beside those of three maps."""
    for view in views(similarity):
        reporter.table(view.title, *_best(similarity, view))
    for note in notes(similarity):
        reporter.say(note)
    reporter.say(CONVENTION)


def _best(similarity: Similarity, view: View) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads and rows: of every student layer its best teacher layer, beside those of three maps."""
    maps, rows = similarity.maps(), []
    for layer, line in enumerate(view.values, start=view.first):
        targets = {name: found[layer - 1] if layer else 0 for name, found in maps.items()}
        cells = [view.best(line), *(target - view.first for target in targets.values())]
        shown = [
            "-" if at is None else f"{at + view.first}: {view.form.format(line[at])}"
            for at in cells
        ]
        rows.append([str(layer), *shown])
    return ("student layer", "best teacher layer", *maps), rows


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
