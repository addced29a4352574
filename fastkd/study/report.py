"""What a study leaves behind: CSV files, pictures, and a report in Markdown and in HTML."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastkd.errors import printable
from fastkd.files.disk import write_whole
from fastkd.reporting.html import (
    document,
    escaped,
    html_table,
    markdown,
    markdown_table,
    scrolling,
    shortened,
)
from fastkd.reporting.plotting import inline_svg, png
from fastkd.study.naming import shown
from fastkd.study.plan import Plan
from fastkd.study.tables import Table

logger = logging.getLogger(__name__)


def write_page(plan: Plan, tables: Iterable[Table], figures: Mapping[str, Figure]) -> Path:
    """Write everything into the `report` folder of a study; return the HTML file.

    The HTML file needs nothing beside it; the Markdown file shows the pictures beside it.
    """
    folder = plan.output / "report"
    folder.mkdir(parents=True, exist_ok=True)
    tables = list(tables)
    for table in tables:
        write_whole(folder / f"{table.name}.csv", _csv(table))
    pictures: dict[str, bytes] = {}
    boxes: set[str] = set()
    for name, figure in figures.items():
        pictures[name], missing = png(figure)
        (folder / f"{name}.png").write_bytes(pictures[name])
        boxes |= missing
    if boxes:
        logger.warning(
            "%s: no font here has %s, so the .png pictures show boxes there; report.html shows "
            "them in the browser's fonts",
            *(folder, printable(shortened("".join(sorted(boxes))))),
        )
    write_whole(folder / "report.md", _markdown(plan, tables, pictures))
    page = folder / "report.html"
    write_whole(page, _html(plan, tables, figures))
    return page


def describe(plan: Plan) -> list[str]:
    """What the study is, in lines for people."""
    spec = plan.spec
    tasks = [task for task in plan.tasks if task is not None]
    lines = [
        f"seeds: {', '.join(map(str, spec.seeds))}",
        f"metric: {spec.metric.path} ({spec.metric.direction})",
    ]
    if tasks:
        lines.insert(0, f"tasks: {', '.join(tasks)}")
    for axis, levels in plan.axes.items():
        lines.append(f"axis {axis}: {', '.join(map(str, levels))}")
    if spec.search is None:
        lines.append(f"grid: {spec.grid or 'full'}")
        return lines
    for name, space in spec.spaces.items():
        values = (
            ", ".join(map(shown, space.values))
            if space.values
            else f"{space.low:g} to {space.high:g}" + (", logarithmic" if space.log else "")
        )
        lines.append(f"space {name}: {space.field}, {values}")
    lines.append(f"search: {spec.search.sampler}, pruner {spec.search.pruner}")
    return lines


def _csv(table: Table) -> str:
    columns = list(dict.fromkeys(key for row in table.numbers for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.numbers)
    return text.getvalue()


def _markdown(plan: Plan, tables: Iterable[Table], pictures: Mapping[str, bytes]) -> str:
    lines = [f"# {plan.spec.name}", ""]
    lines += [f"- {markdown(line)}" for line in describe(plan)]
    for table in tables:
        lines += ["", f"## {markdown(table.title)}", ""]
        if table.rows:
            lines += markdown_table(table.columns, table.rows)
        lines += [line for note in table.notes for line in ("", markdown(note))]
        if table.name in pictures:
            lines += ["", f"![{markdown(table.title)}]({table.name}.png)"]
    for name in _left_over(tables, pictures):
        lines += ["", f"![{name}]({name}.png)"]
    return "\n".join(lines) + "\n"


def _html(plan: Plan, tables: Iterable[Table], figures: Mapping[str, Figure]) -> str:
    page = [
        "<ul class='lead'>",
        *(f"<li>{escaped(line)}</li>" for line in describe(plan)),
        "</ul>",
    ]
    for table in tables:
        page.append(f"<h2>{escaped(table.title)}</h2>")
        if table.rows:
            page.append(html_table(table.columns, table.rows, table.title))
        page += [f"<p>{escaped(note)}</p>" for note in table.notes]
        if table.name in figures:
            page.append(_picture(table.title, figures[table.name]))
    for name in _left_over(tables, figures):
        page += [f"<h2>{escaped(name)}</h2>", _picture(name, figures[name])]
    source = escaped(plan.path.read_text(encoding="utf-8"))
    page.append(f"<h2>Study file</h2><pre>{source}</pre>")
    return document(plan.spec.name, page)


def _picture(title: str, figure: Figure) -> str:
    return f"<figure>{scrolling(inline_svg(figure, title), title)}</figure>"


def _left_over(tables: Iterable[Table], pictures: Mapping[str, Any]) -> list[str]:
    names = {table.name for table in tables}
    return [name for name in pictures if name not in names]
