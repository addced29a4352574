"""What a run came to: a table in the terminal, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fastkd.console import Reporter
from fastkd.recipe import load_recipe
from fastkd.run_folder import RunFolder, write_whole

_NAMED_LINES = 16
Rows = list[tuple[str, ...]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
"""


def print_summary(summary: dict[str, Any], reporter: Reporter) -> None:
    """Print the tables of a finished run."""
    reporter.table("held-out loss", ("term/student-teacher", "before", "after"), _losses(summary))
    reporter.table("run", ("", "teacher", "student"), _models(summary))
    for name, value in _facts(summary):
        reporter.say(f"{name}: {value}")


def print_evaluation(result: dict[str, Any], reporter: Reporter) -> None:
    """Print the table of one evaluation."""
    rows = [(row[0], row[2]) for row in _losses({"before": result, "after": result})]
    reporter.table("held-out loss", ("term/student-teacher", "value"), rows)
    reporter.say(f"held out: {result['tokens']:,} tokens in {result['blocks']} blocks")


def write_report(run: RunFolder) -> None:
    """Write report.html of a finished run."""
    summary, metrics = run.read_summary(), run.read_metrics()
    assert summary is not None, "a report is written after the summary"
    recipe = load_recipe(run.recipe)
    training = [record for record in metrics if record["kind"] == "train"]
    heldout = [record for record in metrics if record["kind"] == "heldout"]
    page = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>{html.escape(run.path.name)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(run.path.name)}</h1>",
        f"<p>{html.escape(recipe.teacher.model)} to {recipe.student.layers} layers</p>",
        html_table(("term/student-teacher", "before", "after"), _losses(summary)),
        html_table(("", "teacher", "student"), _models(summary)),
        html_table(("", ""), _facts(summary)),
        "<h2>Training</h2>",
        _curves(training, "loss, mean over log_every steps"),
        "<h2>Held out</h2>",
        _curves(heldout, "loss on held-out blocks"),
        f"<h2>Recipe</h2><pre>{html.escape(run.recipe.read_text(encoding='utf-8'))}</pre></html>",
    ]
    write_whole(run.report, "\n".join(page))


def _losses(summary: dict[str, Any]) -> Rows:
    before, after = summary["before"], summary["after"]
    rows: Rows = [
        (label, f"{before['losses'][label]:.4g}", f"{value:.4g}")
        for label, value in after["losses"].items()
    ]
    rows.append(("total, weighted", f"{before['total']:.4g}", f"{after['total']:.4g}"))
    cosines = [
        "widths differ" if e["sentence_cosine"] is None else f"{e['sentence_cosine']:.4f}"
        for e in (before, after)
    ]
    rows.append(("sentence embeddings, cosine", *cosines))
    return rows


def _models(summary: dict[str, Any]) -> Rows:
    def row(name: str, values: dict[str, float]) -> tuple[str, ...]:
        return (name, f"{values['teacher']:,.0f}", f"{values['student']:,.0f}")

    return [
        row("parameters", summary["parameters"]),
        row("forward tokens/s", summary["forward_tokens_per_second"]),
    ]


def _facts(summary: dict[str, Any]) -> Rows:
    after = summary["after"]
    return [
        ("trained on", f"{summary['train_tokens']:,} tokens in {summary['steps']} steps"),
        ("held out", f"{after['tokens']:,} tokens in {after['blocks']} blocks"),
        (
            f"peak memory of the {summary['peak_memory_of']}",
            f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ),
        ("time", f"{summary['seconds']:.0f} s on {summary['world_size']} rank(s)"),
        ("run folder", summary["run"]),
    ]


def html_table(columns: Sequence[str], rows: Rows) -> str:
    """A table of text cells; the first column is left, the others are right."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _curves(records: list[dict[str, Any]], title: str) -> str:
    """One panel a term, one line a layer pair, as inline SVG."""
    if not records:
        return "<p>nothing was recorded</p>"
    labels = list(records[0]["losses"])
    terms = list(dict.fromkeys(label.split("/")[0] for label in labels))
    steps = [record["step"] for record in records]
    # text stays text, and the same run gives the same bytes
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastkd"}):
        figure = Figure(figsize=(4.2 * len(terms), 3.2), layout="constrained")
        for axes, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms, strict=True):
            lines = [label for label in labels if label.split("/")[0] == term]
            for label in lines:
                values = [record["losses"][label] for record in records]
                layers = label.partition("/")[2]
                axes.plot(steps, values, marker="." if len(steps) < 30 else "", label=layers)
            axes.set(title=f"{term}: {title}", xlabel="step")
            # a student that starts from its teacher has losses of exactly zero
            axes.set_yscale("log", nonpositive="mask")
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.3, which="both")
            # a term without layers is one line; a many-to-many map has too many to name
            if "/" in lines[0] and len(lines) <= _NAMED_LINES:
                axes.legend(fontsize=8, title="student-teacher layer", title_fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
