"""What is said holds names from elsewhere: they come out as they are, and nothing comes of them."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from study_files import run, write_study
from tiny_training import (
    fastkd,
    run_whole,
    save_classifier,
    save_encoder,
    summary_of,
    write_recipe,
    write_task,
)

from fastkd.errors import UserError, printable
from fastkd.files.disk import disk_errors
from fastkd.reporting.console import Reporter
from fastkd.reporting.encoding import all_names_said
from fastkd.reporting.progress import progress_bar
from fastkd.reporting.report import print_evaluation, print_summary
from fastkd.reporting.streams import silence
from fastkd.training.session import session

HOSTILE = ("[/x]", "[bold]", "[link=https://e.org]a[/link]", ":smile:", "[", "\\[/x]", "[/]")
CONTROL = {"\x1b[2Ja": "\\x1b[2Ja", "a\rb": "a\\rb", "a\x07": "a\\x07", "\u202ea": "\\u202ea"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def reporter(
    *, live: bool = False, width: int = 120, **environment: str
) -> tuple[Reporter, io.StringIO]:
    written = Terminal() if live else io.StringIO()
    made, known = Reporter(), {"TERM": "xterm", **environment}
    made.console = Console(file=written, width=width, highlight=False, _environ=known)
    return made, written


@pytest.mark.parametrize("name", [*HOSTILE, *CONTROL])
def test_names_are_text_wherever_they_are_said(name: str) -> None:
    made, written = reporter()
    made.say(f"task {name}")
    made.table(f"title {name}", ("", f"column {name}"), [(f"row {name}", name)])
    made.metrics(1, 2, [name, f"part {name}"])
    text = written.getvalue()
    expected = CONTROL.get(name, name)
    assert text.count(expected) == 7
    assert all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("name", [*HOSTILE, *CONTROL])
def test_names_are_text_beside_a_bar(name: str) -> None:
    made, written = reporter(live=True)
    with made.steps(0, 2):
        made.metrics(1, 2, [name, name])
        made.advance(2)
    assert CONTROL.get(name, name) in written.getvalue()
    assert "\x1b[2Ja" not in written.getvalue()


@pytest.mark.parametrize(
    ("live", "environment"),
    [
        (False, {}),
        (False, {"FORCE_COLOR": "1"}),
        (False, {"TTY_COMPATIBLE": "1"}),
        (True, {"TERM": "dumb"}),
        (True, {"TTY_INTERACTIVE": "0"}),
    ],
)
def test_where_no_cursor_moves_metrics_are_lines(live: bool, environment: dict[str, str]) -> None:
    made, written = reporter(live=live, **environment)
    with made.steps(0, 2):
        for step in (1, 2):
            made.advance(step)
            made.metrics(step, 2, ["loss 0.5", "9 tokens/s"])
    lines = [f"step {step}/2  loss 0.5  9 tokens/s" for step in (1, 2)]
    assert written.getvalue().splitlines() == lines


def test_a_bar_in_a_log_moves_no_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    with progress_bar(True) as bar:
        bar.advance(bar.add_task("tokenising", total=2), 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenising") and line.isprintable() and "2/2" in line


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Callable[[], str]]:
    """Makes stdout one of an encoding; what it gives reads what was written."""

    def set_up(encoding: str, errors: str) -> Callable[[], str]:
        written = io.BytesIO()
        stream = io.TextIOWrapper(written, encoding, errors)
        monkeypatch.setattr(sys, "stdout", stream)

        def read() -> str:
            stream.flush()
            assert stream.errors == errors
            return written.getvalue().decode(encoding)

        return read

    return set_up


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_names_beyond_an_encoding_are_written_out(
    errors: str,
    narrow: Callable[[str, str], Callable[[], str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = narrow("ascii", errors)
    with session() as (_, own):
        own.say("läufe/東京")
        own.table("±", ("", "é"), [("Ω", "1")])
    monkeypatch.setattr("fastkd.__version__", "\u03b2")
    assert fastkd("--version", monkeypatch=monkeypatch) == 0
    text = said()
    assert "l\\xe4ufe/\\u6771\\u4eac\n" in text and text.endswith("fastkd \\u03b2\n")
    assert all(name in text for name in ("\\xb1", "\\xe9", "\\u03a9"))


def test_a_study_writes_names_out(
    tmp_path: Path,
    narrow: Callable[[str, str], Callable[[], str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_JOURNAL", str(tmp_path / "journal"))
    said = narrow("ascii", "strict")
    run(write_study(tmp_path, output=str(tmp_path / "größe")), reporter=None)
    assert said().count("gr\\xf6\\xdfe") > 1


def test_who_chose_how_to_write_names_keeps_it(
    narrow: Callable[[str, str], Callable[[], str]],
) -> None:
    said = narrow("ascii", "replace")
    with all_names_said():
        Reporter().say("é")
    assert said() == "?\n"


NAMES = [f"tinybert-losses-seed-{number}" for number in range(9)]
SPEEDS = [f"{number},000,000,000" for number in range(1, 10)]


def test_a_log_has_no_width(capsys: pytest.CaptureFixture[str]) -> None:
    message = "loss hidden/2-4 is not finite at step 137; " + 20 * "say it all, "
    Reporter().table("failed", ("run", "state", "message"), [(NAMES[0], "failed", message)])
    Reporter().table("run", ("", *NAMES), [["tokens/s", *SPEEDS]], apart=True)
    lines = capsys.readouterr().out.splitlines()
    for cells in ((NAMES[0], "failed", message.strip()), NAMES, ("tokens/s", *SPEEDS)):
        assert [line for line in lines if all(f" {cell} " in line for cell in cells)]
    assert not any(len(line) > 1000 for line in lines)


class WriteOnly:
    """A caller's stdout, which can do no more."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def closed() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, WriteOnly(), closed(), io.TextIOWrapper(io.BytesIO())])
def test_any_stdout_will_do(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with session() as (_, made), made.steps(0, 1), progress_bar(True) as bar:
        made.say("one line")
        bar.advance(bar.add_task("tokenising", total=2), 2)
        if isinstance(stream, io.TextIOWrapper):
            # also in between
            stream.close()
        made.metrics(1, 1, ["loss 0.5"])
        made.table("a table", ["", "a"], [["b", "1"]])
    if isinstance(stream, WriteOnly):
        assert "one line\n" in stream.text and "step 1/1  loss 0.5\n" in stream.text


@pytest.mark.parametrize("width", [60, 25])
def test_a_narrow_terminal_cuts_nothing(width: int) -> None:
    made, written = reporter(live=True, width=width)
    made.table("failed", ("run", "message"), [(NAMES[0], "start-again-with-a-smaller-rate" * 9)])
    made.table("run", ("", *NAMES), [["tokens/s", *SPEEDS]], apart=True)
    text = re.sub(r"\x1b\[[\d;]*m", "", written.getvalue())
    assert "…" not in text and all(len(line) <= width for line in text.splitlines())
    if width < 60:
        return
    failed, *tables = re.split(r"run \(\d of 5\)", text)
    assert len(tables) == 5
    bars = "│┃"
    rows = [re.split(f"[{bars}]", line)[1:-1] for line in failed.splitlines() if line[:1] in bars]
    folded = ["".join(row[index].strip() for row in rows) for index in (0, 1)]
    assert folded == [f"run{NAMES[0]}", "message" + "start-again-with-a-smaller-rate" * 9]
    # each with the row's name; the numbers are whole, and heads say of which run they are
    told = []
    for table in tables:
        heads = [re.split("┃", line)[2:-1] for line in table.splitlines() if line.startswith("┃")]
        (row,) = (re.split("│", line)[1:-1] for line in table.splitlines() if line[:1] == "│")
        assert row[0].strip() == "tokens/s"
        whole = ["".join(part.strip() for part in head) for head in zip(*heads, strict=True)]
        told += zip(whole, (cell.strip() for cell in row[1:]), strict=True)
    assert told == list(zip(NAMES, SPEEDS, strict=True))


@pytest.mark.parametrize("opened", [os.pipe, os.openpty])
def test_a_reader_that_ends_is_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    opened: Callable[[], tuple[int, int]],
) -> None:
    reads, writes = opened()
    os.close(reads)
    with os.fdopen(writes, "w") as stdout, monkeypatch.context() as piped:
        piped.setattr(sys, "stdout", stdout)
        reporter = Reporter()
        for step in range(3):
            reporter.say("a line that nobody reads")
            with reporter.steps(0, 3):
                reporter.metrics(step, 3, ["loss 1"])
        reporter.table("a table", ["", "a"], [["b", "1"]])
        # by others
        print("more", flush=True)
    assert capfd.readouterr() == ("", "")


def test_a_log_on_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open("/dev/full", "w") as stdout, monkeypatch.context() as full:
        full.setattr(sys, "stdout", stdout)
        with pytest.raises(UserError, match=r"^/dev/full: writing failed"), disk_errors(tmp_path):
            Reporter().say("a line that finds no room")
        # what is buffered would be written as the file is closed
        silence(stdout)


def test_a_mistake_that_no_terminal_can_show_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads, writes = os.openpty()
    os.close(reads)
    with os.fdopen(writes, "w") as stderr, monkeypatch.context() as closed:
        closed.setattr(sys, "stderr", stderr)
        assert fastkd("evaluate", "nowhere", monkeypatch=closed) == 2


def test_several_lines_stay_several() -> None:
    made, written = reporter()
    made.say("preset, written out:\na: 1\nb: 2")
    assert written.getvalue() == "preset, written out:\na: 1\nb: 2\n"


@pytest.mark.parametrize("name", [*CONTROL, "a\nb", "\udc80", "\0"])
def test_an_error_is_one_line_that_moves_no_cursor(name: str) -> None:
    said = str(UserError(f"{name}: no such file"))
    assert said.isprintable() and said == f"{printable(name)}: no such file"
    assert printable("é 東京 \U0001f600") == "é 東京 \U0001f600"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_split_is_a_row_of_the_summary(name: str) -> None:
    judged: dict[str, Any] = {
        "losses": {"labels": 1.0},
        "total": 1.0,
        "score": 0.5,
        "scores": {name: {"accuracy": 0.5}},
        "examples": 3,
    }
    made, written = reporter()
    print_evaluation(judged, made)
    summary = {
        **{"before": judged, "after": judged, "steps": 1, "train_examples": 3, "task_examples": 3},
        **{"parameters": {"student": 1}, "disk_bytes": {"student": 1}, "worse": []},
        **{"peak_memory_of": name, "peak_memory_bytes": 1, "seconds": 1.0, "world_size": 1},
        "run": f"runs/{name}",
    }
    print_summary(summary, made)
    assert written.getvalue().count(f"{name}, accuracy") == 2
    assert f"run folder: runs/{name}" in written.getvalue()


def test_a_run_on_a_hostile_split_ends_well(tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    save_encoder(tmp_path / "encoder")
    split = "[red]<b>$x$"
    for old, new in (("dev", split), ("train", f"{split}2")):
        (tmp_path / "task" / f"{old}.tsv").rename(tmp_path / "task" / f"{new}.tsv")
    task = {"name": "[/x]", "train": f"{split}2", "evaluate": [split]}
    path = write_recipe(tmp_path, "tuned", task=task, train={"steps": 1})
    said = run_whole("finetune", path)
    assert f"{split}, accuracy" in said
    assert split in summary_of(tmp_path / "tuned")["after"]["scores"]
    page = (tmp_path / "tuned" / "report.html").read_text()
    assert "<b>" not in page and "fine-tuned on [/x]" in page


def test_a_label_that_is_markup_is_named_in_the_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier", num_labels=2)
    path = write_recipe(tmp_path, "run", task={"labels": ["[/x]", "\x1b[2J"]})
    assert fastkd("distill", str(path), monkeypatch=monkeypatch) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("fastkd:")]
    assert "[/x], \\x1b[2J" in line and line.isprintable()
