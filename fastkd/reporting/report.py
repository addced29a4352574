"""What a run came to: a table in the terminal, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkd.files.disk import disk_errors, write_whole
from fastkd.recipe import AnyRecipe, Recipe, load_any_recipe
from fastkd.reporting.console import Reporter
from fastkd.reporting.curves import heldout_panels, last_weights, score_panels, training_panels
from fastkd.reporting.html import (
    document,
    escaped,
    html_table,
)
from fastkd.reporting.layer_figure import layer_figures
from fastkd.reporting.numbers import fixed, number
from fastkd.reporting.profile import (
    memory_bars,
    memory_rows,
    time_bars,
    time_columns,
    time_rows,
)
from fastkd.reporting.scores import one_class, score_table
from fastkd.reporting.svg import Bar, Panel, bars, chart
from fastkd.training.beginnings import STAGE
from fastkd.training.run_folder import RunFolder

TOTAL = "total, weighted"
"""What the row of the weighted sum of losses is called."""
# what data is counted in that is not text in blocks, and where a summary says how much there is
_COUNTED = (("examples", "task_examples"), ("rows", "data_rows"))
Rows = list[tuple[str, ...]]


def print_summary(summary: dict[str, Any], reporter: Reporter) -> None:
    """Print the tables of a finished run; of a lean one, which holds nothing against its end, what
    it was trained on."""
    if summary["before"] is not None:
        heads = ("term/student-teacher", "before", "after")
        reporter.table("held-out loss", heads, loss_rows(summary))
        for columns, rows in score_tables(summary):
            reporter.table("scores", columns, rows)
    reporter.table("run", ("", *model_heads(summary)), model_rows(summary))
    for title, columns, rows in _profile(summary):
        reporter.table(title, columns, rows)
    for name, value in _facts(summary):
        reporter.say(f"{name}: {value}")


def print_evaluation(result: dict[str, Any], reporter: Reporter) -> None:
    """Print the table of one evaluation."""
    rows = [(row[0], row[2]) for row in loss_rows({"before": result, "after": result})]
    reporter.table("held-out loss", ("term/student-teacher", "value"), rows)
    teacher = {"teacher": result["teacher"]} if "teacher" in result else {}
    columns, values = score_table({**teacher, "student" if teacher else "value": result})
    if values:
        reporter.table("scores", columns, values)
    if same := one_class(result):
        reporter.say(f"warning: the model predicts {same}")
    reporter.say(f"held out: {_heldout(result)}")
    if "kept" in result:
        reporter.say(f"of the teacher: {_kept(result['kept'])}")


def _kept(kept: dict[str, float | None]) -> str:
    share, low, high = kept["share"], kept["low"], kept["high"]
    if share is None or low is None or high is None:
        return "nothing to keep; it is not above one answer to everything by two standard errors"
    ends = f"{share:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{ends} of what it is above one answer; 95 % interval over the examples"


def write_report(run: RunFolder) -> None:
    """Write report.html of a finished run."""
    summary, metrics = run.read_summary(), run.read_metrics()
    assert summary is not None, "a report is written after the summary"
    recipe = load_any_recipe(run.recipe)
    training = [line for line in metrics if line["kind"] == "train"]
    heldout = [line for line in metrics if line["kind"] == "heldout"]
    weights = last_weights(training)
    depths = summary.get("depths")
    layers = layer_figures(list(summary["after"]["losses"]), weights, depths and tuple(depths))
    scores = score_panels(heldout, summary.get("teacher", {}))
    body = [
        f"<p class='lead'>{escaped(_subject(recipe))}</p>",
        "<h2>Held out, before and after</h2>",
        html_table(
            ("term/student-teacher", "before", "after"), loss_rows(summary), "held-out losses"
        ),
        *(html_table(columns, rows, "scores") for columns, rows in score_tables(summary)),
        *_section(_scores_title(summary), chart(scores) if scores else ""),
        *_section("Layers", f"<div class='panels'>{''.join(layers)}</div>" if layers else ""),
        *_section(
            "Training, mean over log_every steps or of the last of them",
            _panels(training_panels(training)),
        ),
        *_section("Held-out losses over the run", _panels(heldout_panels(heldout))),
        *_profile_sections(summary),
        "<h2>Run</h2>",
        html_table(("", *model_heads(summary)), model_rows(summary), "models"),
        html_table(("", ""), _facts(summary), "facts of the run"),
        f"<h2>Recipe</h2><pre>{escaped(run.recipe.read_text(encoding='utf-8'))}</pre>",
    ]
    with disk_errors(run.path):
        write_whole(run.report, document(_title(run.path), body))


def _title(folder: Path) -> str:
    """What a run is called: a stage by the whole run's folder, too."""
    # also of a run in the working folder
    there = Path(os.path.abspath(folder))
    return f"{there.parent.name}, {there.name}" if STAGE.fullmatch(there.name) else there.name


def loss_rows(summary: dict[str, Any]) -> Rows:
    """Held-out losses and what else compares both models' outputs, before and after; of a run in
    stages those of each stage, which has losses of its own."""
    parts = stages_of(summary)
    if len(parts) == 1:
        return _loss_rows(summary["before"], summary["after"])
    return [
        (f"stage {place}: {label}", *values)
        for place, part in enumerate(parts, start=1)
        for label, *values in _loss_rows(part["before"], part["after"])
    ]


def stages_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The summaries of a run's stages; its own where it has none."""
    return summary.get("stages") or [summary]


def _loss_rows(before: dict[str, Any] | None, after: dict[str, Any]) -> Rows:
    if before is None:
        # its line of the metrics is lost
        return [(label, "-", value) for label, _, value in _loss_rows(after, after)]
    rows: Rows = [
        (label, f"{before['losses'][label]:.4g}", f"{value:.4g}")
        for label, value in after["losses"].items()
    ]
    rows.append((TOTAL, f"{before['total']:.4g}", f"{after['total']:.4g}"))
    if "sentence_cosine" in after:
        cosines = [
            "not comparable" if e["sentence_cosine"] is None else f"{e['sentence_cosine']:.4f}"
            for e in (before, after)
        ]
        rows.append(("sentence embeddings, cosine", *cosines))
    if "agreement" in after:
        rows += [
            (
                f"student and teacher, {name.replace('_', ' ')}",
                *(f"{e['agreement'][name]:.4f}" for e in (before, after)),
            )
            for name in after["agreement"]
        ]
    return rows


def score_tables(summary: dict[str, Any]) -> list[tuple[tuple[str, ...], Rows]]:
    """Heads and rows of the scores, where there are any."""
    names = ("teacher", "before", "after")
    models = {name: summary[name] for name in names if summary.get(name) is not None}
    columns, rows = score_table(models)
    return [(columns, rows)] if rows else []


def _model_names(summary: dict[str, Any]) -> list[str]:
    return [name for name in ("teacher", "student") if name in summary["parameters"]]


def model_heads(summary: dict[str, Any]) -> list[str]:
    """Heads of the columns of `model_rows`, which are of the first of several teachers."""
    first = f"first of {summary['teachers']} teachers" if "teachers" in summary else "teacher"
    return [first if name == "teacher" else name for name in _model_names(summary)]


def model_rows(summary: dict[str, Any]) -> Rows:
    names = _model_names(summary)
    parameters = summary["parameters"]
    rows: Rows = [("parameters", *(f"{parameters[name]:,}" for name in names))]
    sizes = [f"{fixed(summary['disk_bytes'][name] / 2**20, 1)} MiB" for name in names]
    rows.append(("size on disk", *sizes))
    # lean runs don't measure it
    if "speed" in summary:
        rows += _speeds(summary["speed"], names)
    return rows


def _speeds(speed: dict[str, Any], names: list[str]) -> Rows:
    """Latency and throughput of a forward pass, see `fastkd.training.speed`."""
    rows: Rows = []
    # a teacher with a tokenizer of its own makes other tokens of the same text
    lengths = dict.fromkeys(str(speed["tokens"][name]) for name in names)
    for batch, models in speed["batches"].items():
        found = [models.get(name) for name in names]
        size = f"{batch} x {'/'.join(lengths)}"
        latencies = [f"{number(one['milliseconds'])} ms" if one else "-" for one in found]
        rates = [fixed(one["tokens_per_second"]) if one else "-" for one in found]
        rows += [(f"forward of {size} tokens", *latencies), (f"tokens/s at {size}", *rates)]
    return rows


def _trained(summary: dict[str, Any]) -> str:
    """How much a run read, in which steps and passes; stages may read data of other sizes."""
    steps = f"{summary['steps']:,} step{'s' if summary['steps'] != 1 else ''}"
    if "train_tokens" in summary:
        return f"{summary['train_tokens']:,} tokens in {steps}"
    kind, there = _COUNTED["train_rows" in summary]
    passes = sum(part[f"train_{kind}"] / part[there] for part in stages_of(summary))
    return f"{summary[f'train_{kind}']:,} {kind} in {steps}, {fixed(passes, 2)} passes"


def _steering(summary: dict[str, Any]) -> Rows:
    """What evaluations decided; each stage counts steps of its own."""
    rows: Rows = []
    parts = stages_of(summary)
    for place, part in enumerate(parts, start=1):
        of = f" by stage {place}" if len(parts) > 1 else ""
        if part.get("stopped_early"):
            rows.append((f"stopped early{of}", f"after {part['steps']:,} steps"))
        if exported := exported_step(part):
            rows.append((f"exported{of}", exported))
    return rows


def _facts(summary: dict[str, Any]) -> Rows:
    worse = "; ".join(summary["worse"])
    same = one_class(summary["after"])
    return [
        ("trained on", _trained(summary)),
        *_steering(summary),
        ("held out", _heldout(summary["after"])),
        *([("worse than before", worse)] if worse else []),
        *([("warning", f"the student predicts {same}")] if same else []),
        (
            f"peak memory of the {summary['peak_memory_of']}",
            f"{fixed(summary['peak_memory_bytes'] / 2**20)} MiB",
        ),
        ("time", f"{fixed(summary['seconds'])} s on {summary['world_size']} rank(s)"),
        ("run folder", summary["run"]),
        *_pages(summary),
    ]


def _pages(summary: dict[str, Any]) -> Rows:
    """Where the pages are of a run in stages, which has none of its own; a lean one has none."""
    stages = summary.get("stages", [])
    if not stages or summary["before"] is None:
        return []
    pages = (f"{Path(stage['run']).name}/report.html" for stage in stages)
    return [("pages of the stages, in the run folder", ", ".join(pages))]


def exported_step(summary: Mapping[str, Any]) -> str | None:
    """Which student was exported, of a run or stage that kept the best."""
    kept = summary.get("kept_best")
    if not kept:
        return None
    best = f"whose {kept['metric']} is the best ({number(kept['value'])})"
    return f"the student of step {summary['exported_step']:,}, {best}"


def _profile(summary: dict[str, Any]) -> list[tuple[str, tuple[str, ...], Rows]]:
    """Title, heads and rows of time and of memory, where they were measured; of a run in stages
    those of the last."""
    *others, last = stages_of(summary)
    profile = last.get("profile")
    if profile is None:
        return []
    of = ", last stage" if others else ""
    return [
        (f"time of a step{of}", time_columns(profile), time_rows(profile)),
        (
            f"memory of the {last['peak_memory_of']}{of}",
            ("", "size"),
            memory_rows(*_memory(last)),
        ),
    ]


def _memory(summary: dict[str, Any]) -> tuple[dict[str, int], int, str]:
    """What memory held by part, its peak, and what it is of."""
    parts = summary["profile"]["memory_bytes"]
    return parts, summary["peak_memory_bytes"], summary["peak_memory_of"]


def _heldout(judged: dict[str, Any]) -> str:
    for kind, _ in _COUNTED:
        if kind in judged:
            return f"{judged[kind]:,} {kind}"
    return f"{judged['tokens']:,} tokens in {judged['blocks']} blocks"


def _subject(recipe: AnyRecipe) -> str:
    if isinstance(recipe, Recipe):
        layers = recipe.student.layers
        made = recipe.student.init if layers is None else f"{layers} layers"
        return f"{recipe.teacher.model} to {made}"
    return f"{recipe.model.name}, fine-tuned on {recipe.task.name}"


def _scores_title(summary: dict[str, Any]) -> str:
    return "Score of the task" if "score" in summary["after"] else "Scores over the run"


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{escaped(title)}</h2>", content] if content else []


def _panels(panels: list[Panel]) -> str:
    return chart(panels) if panels else "<p>nothing was recorded</p>"


def _profile_sections(summary: dict[str, Any]) -> list[str]:
    """Where the time of a step goes and what memory holds, drawn and as tables."""
    tables = _profile(summary)
    if not tables:
        return []
    drawn = time_bars(summary["profile"]), memory_bars(*_memory(summary))
    found = []
    for (title, columns, rows), sizes in zip(tables, drawn, strict=True):
        made = [Bar(*size) for size in sizes]
        parts = bars(columns[0] or "by part", made), html_table(columns, rows, title)
        found += _section(title.capitalize(), f"<div class='panels'>{''.join(parts)}</div>")
    return found
