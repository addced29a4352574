"""Pages show names, labels, paths and files of strangers as text, and would run nothing anyway."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import dump, needs_chromium
from fuzz_recipes import LABELLED, TEXT
from study_files import RECIPE, write_study

from fastkd.recipe import dump_recipe, parse_any_recipe
from fastkd.reporting.html import (
    POLICY,
    document,
    escaped,
    html_table,
    markdown,
)
from fastkd.reporting.report import write_report
from fastkd.study import load_study
from fastkd.study.plan import Plan
from fastkd.study.plots import make_plots
from fastkd.study.report import write_page
from fastkd.study.results import Results
from fastkd.study.storage import Record
from fastkd.study.tables import make_tables
from fastkd.training.metric_lines import make_line
from fastkd.training.run_folder import RunFolder

HOSTILE = (
    "<script>document.title='ran'</script>",
    "</title><script>document.title='ran'</script>",
    "</pre></style><img src=x onerror=document.title='ran'>",
    "' onmouseover='document.title=1' x='",
    '"><svg onload=document.title=1>',
    "<!--",
    "]]><b>",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "<a href=javascript:alert(1)>x</a>",
    "$x$ $",
    "a\x1b[2J\x07\u202eb",
    "</svg></text><iframe src=https://example.org>",
    "[/x] ![a](https://example.org/a.png) | `b` | **c**",
)
PLAIN = "harmless"


class Structure(HTMLParser):
    """Elements with the names of their attributes, and what is text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        # outside of pictures, and what pictures are made of: their ticks follow the labels' lengths
        self.outside: list[tuple[str, tuple[str, ...]]] = []
        self.drawn: set[str] = set()
        self.pictures = 0
        self.values: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.pictures += tag == "svg"
        if self.pictures:
            self.drawn.add(tag)
        else:
            self.outside.append(self.elements[-1])
        self.values += [value or "" for _, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.pictures -= tag == "svg"

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", ()))

    def handle_data(self, data: str) -> None:
        self.text += data


def check_harmless(page: str) -> Structure:
    """See that a page runs and loads nothing."""
    found = Structure(page)
    tags = [tag for tag, _ in found.elements]
    assert not set(tags) & {"script", "iframe", "object", "embed", "link", "form", "base", "a"}
    assert not [n for _, names in found.elements for n in names if n.startswith("on")]
    # before anything that it rules over
    assert tags[:5] == ["html", "head", "meta", "meta", "title"]
    assert f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">' in page
    assert "script" not in POLICY and POLICY.startswith("default-src 'none'")
    loads = [value for value in found.values if ":" in value and not value.startswith("data:image")]
    links = [v for v in loads if v.lower().startswith(("http", "javascript", "//"))]
    assert all(link.startswith("http://www.w3.org/") for link in links)
    return found


def shown(name: str) -> str:
    """What a reader is to see of a name."""
    return name.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\u202e", "\\u202e")


def report(folder: Path, name: str) -> str:
    """The report of a run that has a name wherever one could stand."""
    run = RunFolder(folder / name.replace("/", "_"))
    run.path.mkdir(parents=True)
    task = {**LABELLED["task"], "name": name, "source": name, "labels": [name, "b"]}
    tree = {**LABELLED, "task": task, "teacher": {"model": name}, "run": {"output": str(run.path)}}
    run.recipe.write_text(dump_recipe(parse_any_recipe(tree)))
    judged = {
        **{"losses": {f"hidden/{name}": 1.0, "labels": 0.5}, "total": 1.5, "examples": 3},
        **{"score": 0.5, "scores": {name: {"accuracy": 0.5}}},
    }
    models = {"student": 1.0, "teacher": 2.0}
    summary = {
        **{"before": judged, "after": judged, "teacher": judged, "steps": 1, "seconds": 1.0},
        **{"train_examples": 3, "task_examples": 3, "world_size": 1, "parameters": models},
        **{"disk_bytes": models, "worse": [], "peak_memory_of": name, "peak_memory_bytes": 1},
        "run": str(run.path),
    }
    run.summary.write_text(json.dumps(summary))
    lines = [make_line(kind, step, judged) for kind in ("train", "heldout") for step in (0, 1)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run)
    return run.report.read_text()


@pytest.fixture(scope="module")
def plain_report(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    return check_harmless(report(tmp_path_factory.mktemp("report"), PLAIN))


def test_the_page_of_a_stage_is_called_by_its_run_too(tmp_path: Path) -> None:
    assert "<title>mine, stage-1</title>" in report(tmp_path / "mine", "stage-1")
    assert "<title>stage</title>" in report(tmp_path / "mine", "stage")


@pytest.fixture(scope="module")
def plain_study(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    return check_harmless(study(tmp_path_factory.mktemp("study"), PLAIN)[0])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_report_shows_hostile_names_as_text(
    tmp_path: Path, name: str, plain_report: Structure
) -> None:
    found = check_harmless(report(tmp_path, name))
    assert found.elements == plain_report.elements
    assert found.text.count(shown(name)) >= 5


def study(folder: Path, name: str, **changes: Any) -> tuple[str, str]:
    """The pages of a study that has a name wherever one could stand."""
    folder.mkdir(exist_ok=True)
    changes.setdefault("axes", None)
    space = {"field": "task.columns.label", "values": [name, "b"]}
    path = write_study(folder, spaces={"x": space}, output=str(folder / "out"), **changes)
    path.write_text(path.read_text() + f"# {json.dumps(name)}\n")
    plan = Plan(load_study(path), path)
    conditions = [
        *plan.conditions,
        *([plan.candidate("t", {"x": name})] if changes.get("search") else []),
    ]
    runs = [run for condition in conditions for run in plan.runs(condition)]
    records = [Record(run, "finished", 0.5 + run.seed, 1.0) for run in runs[:-1]]
    results = Results(plan, [*records, Record(runs[-1], "failed", message=name)])
    page = write_page(plan, make_tables(results, {}), make_plots(results, {}))
    return page.read_text(), page.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_study_shows_hostile_names_as_text(
    tmp_path: Path, name: str, plain_study: Structure
) -> None:
    metric = {"path": f"after.{name}", "direction": "maximize"}
    recipe = {**RECIPE, "teacher": {"model": name}}
    page, text = study(tmp_path, name, metric=metric, recipe=recipe)
    found = check_harmless(page)
    assert found.outside == plain_study.outside and found.drawn == plain_study.drawn
    assert found.text.count(shown(name)) >= 3 and found.pictures == 0
    assert "<script" not in text and "<img" not in text and "](http" not in text


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("name", [HOSTILE[0], "$x$ $", "</b>"])
def test_a_search_shows_hostile_names_as_text(tmp_path: Path, name: str) -> None:
    found = check_harmless(study(tmp_path, name, search={"trials": 2})[0])
    assert shown(name) in found.text


def test_markdown_of_names_has_no_markup_of_theirs() -> None:
    assert markdown("a|b <i> [x](y) ![x][y]\n# c") == ("a\\|b &lt;i&gt; [x]\\(y) ![x]\\[y]\\n# c")
    assert markdown("+0.1 [+0.05, +0.2]") == "+0.1 [+0.05, +0.2]"


@needs_chromium
def test_a_browser_runs_nothing_of_a_page(tmp_path: Path) -> None:
    # also where something was not escaped, the policy stands
    raw = document("page", ["<script>document.title='ran'</script>", html_table(["a"], [HOSTILE])])
    pages = [raw, report(tmp_path, HOSTILE[1]), study(tmp_path / "s", HOSTILE[2])[0]]
    for number, page in enumerate(pages):
        path = tmp_path / f"{number}.html"
        path.write_text(page)
        title = dump(path).stdout.split("<title>")[1].split("</title>")[0]
        assert title not in ("ran", "1") and title


def test_escaping_keeps_lines_and_shows_what_can_not_be_printed() -> None:
    assert escaped("a\n\tb\x00\x1b'\"<") == "a\n\tb\\x00\\x1b&#x27;&quot;&lt;"
    assert TEXT["run"]["output"] in escaped(dump_recipe(parse_any_recipe(TEXT)))
