"""What a run came to, in tables and lines: runs in stages, and numbers that are small or large."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from tiny_cards import tiny_summary

from fastkd.reporting.console import Reporter
from fastkd.reporting.numbers import fixed, percent
from fastkd.reporting.profile import time_bars, time_rows
from fastkd.reporting.report import loss_rows, print_summary
from fastkd.training.run_folder import RunFolder
from fastkd.training.stages import join_summaries

GIB = 2**30


def printed(summary: dict[str, Any]) -> str:
    reporter, written = Reporter(), io.StringIO()
    reporter.console = Console(file=written, width=120)
    print_summary(summary, reporter)
    return written.getvalue()


def judged(total: float, **losses: float) -> dict[str, Any]:
    return {"losses": losses, "total": total, "examples": 9}


def stage(**changes: Any) -> dict[str, Any]:
    ends = {"before": judged(1.0, labels=1.0), "after": judged(1.0, labels=1.0)}
    known = {"run": "stage", "seconds": 1.0, "peak_memory_bytes": GIB, **ends}
    made = tiny_summary(**(known | changes))
    return {key: value for key, value in made.items() if key != "train_tokens"}


def staged() -> dict[str, Any]:
    """Losses inside, on augmented examples and with much memory; then the logits."""
    memory = {"steps": 1, "milliseconds": 1.0, "phases": {}, "memory_bytes": {"weights": GIB // 4}}
    phases = {"rest": {"milliseconds": 1.0, "share": 1.0}}
    first = stage(
        **{"steps": 600, "train_examples": 9_600, "task_examples": 18_340},
        **{"before": judged(24.5, attention=8.75, hidden=0.25), "worse": ["hidden"]},
        after=judged(2.5, attention=0.5, hidden=0.0625),
        profile={**memory, "phases": phases, "memory_bytes": {"weights": 30 * GIB}},
    )
    second = stage(
        **{"steps": 200, "train_examples": 3_200, "task_examples": 3_668},
        **{"before": judged(90.0, logits=0.9), "after": judged(60.0, logits=0.6)},
        profile={**memory, "phases": phases},
    )
    return join_summaries(RunFolder("runs/x"), [{**first, "peak_memory_bytes": 40 * GIB}, second])


def test_losses_of_a_stage_stand_against_its_own() -> None:
    assert loss_rows(staged()) == [
        ("stage 1: attention", "8.75", "0.5"),
        ("stage 1: hidden", "0.25", "0.0625"),
        ("stage 1: total, weighted", "24.5", "2.5"),
        ("stage 2: logits", "0.9", "0.6"),
        ("stage 2: total, weighted", "90", "60"),
    ]
    assert loss_rows(stage()) == [("labels", "1", "1"), ("total, weighted", "1", "1")]


def test_the_pages_of_a_run_in_stages_are_named() -> None:
    read = {"train_examples": 8, "task_examples": 8}
    parts = [stage(**read, run=f"elsewhere/x/stage-{number}") for number in (1, 2)]
    said = printed(join_summaries(RunFolder("runs/x"), parts))
    pages = "stage-1/report.html, stage-2/report.html"
    assert f"pages of the stages, in the run folder: {pages}\n" in said
    assert "pages of the stages" not in printed(stage(**read))


def test_passes_are_over_the_data_of_each_stage_and_the_peak_is_that_of_all() -> None:
    said = printed(staged())
    # 9,600 / 18,340 + 3,200 / 3,668 = 0.5234 + 0.8724
    assert "trained on: 12,800 examples in 800 steps, 1.40 passes\n" in said
    assert "peak memory of the process: 40,960 MiB\n" in said and "time: 2 s on" in said
    # parts of memory are of the stage whose peak stands below them
    memory = said[said.index("memory of the process, last stage") :]
    assert "time of a step, last stage" in said and "40,960" not in memory.partition("trained")[0]
    assert "256 MiB" in memory and "768 MiB" in memory and "1,024 MiB" in memory


def test_what_stages_stopped_and_kept_is_told_by_stage() -> None:
    kept = {"kept_best": {"metric": "score", "value": 0.875}, "exported_step": 20}
    steps = {"train_examples": 8, "task_examples": 8, "steps": 30}
    parts = [stage(**steps, stopped_early=True), stage(**steps, **kept)]
    said = printed(join_summaries(RunFolder("runs/x"), parts))
    assert "stopped early by stage 1: after 30 steps\n" in said
    best = "the student of step 20, whose score is the best (0.875)\n"
    assert f"exported by stage 2: {best}" in said and "in 60 steps, 2.00 passes" in said
    alone = printed(stage(**steps, **kept, stopped_early=True))
    assert f"exported: {best}" in alone and "stopped early: after 30 steps" in alone


def test_peaks_of_another_kind_of_memory_do_not_count() -> None:
    resumed = join_summaries(
        RunFolder("runs/x"),
        [{**stage(), "peak_memory_of": "GPU", "peak_memory_bytes": 9 * GIB}, stage()],
    )
    assert (resumed["peak_memory_of"], resumed["peak_memory_bytes"]) == ("process", GIB)


@pytest.mark.parametrize(
    ("value", "places", "said"),
    [
        *((0.0, 0, "0"), (0.0, 2, "0.00"), (0.4, 0, "0.40"), (1234.5, 1, "1,234.5")),
        *((160 / 67349, 2, "0.0024"), (32 / 392702, 2, "0.000081"), (3.488, 2, "3.49")),
        *((-0.0004, 2, "-0.00040"), (float("nan"), 1, "nan"), (float("inf"), 0, "inf")),
    ],
)
def test_what_is_there_does_not_read_as_nothing(value: float, places: int, said: str) -> None:
    assert fixed(value, places) == said


@pytest.mark.parametrize(
    ("share", "said"),
    [
        *((0.0, "0.0%"), (1e-6, "<0.1%"), (0.001, "0.1%"), (0.5, "50.0%")),
        *((0.9994, "99.9%"), (0.999999, ">99.9%"), (1.0, "100.0%")),
    ],
)
def test_a_share_is_neither_none_nor_all_unless_it_is(share: float, said: str) -> None:
    assert percent(share, 1) == said
    assert percent(1e-6) == "<1%" and percent(0.999999) == ">99%" and percent(0.25) == "25%"


def test_small_and_large_numbers_of_a_run_are_told() -> None:
    passes = {"milliseconds": 12345.678, "tokens_per_second": 0.25}
    summary = stage(
        **{"steps": 1, "train_examples": 160, "task_examples": 67_349, "seconds": 0.4},
        disk_bytes={"teacher": 5 * GIB, "student": 1000},
        speed={
            **{"tokens": {"teacher": 8, "student": 8}, "threads": 1},
            "batches": {"1": {"teacher": passes, "student": {**passes, "milliseconds": 0.00123}}},
        },
    )
    said = printed(summary)
    assert "160 examples in 1 step, 0.0024 passes\n" in said and "time: 0.40 s on" in said
    for cell in ("5,120.0 MiB", "0.00095 MiB", "12,346 ms", "0.00123 ms", "0.25"):
        assert f" {cell} " in said, cell
    assert "e+" not in said


def test_phases_that_take_almost_all_or_nothing_are_told() -> None:
    phases = {
        "data": {"milliseconds": 0.001, "share": 1e-6},
        "teacher": {"milliseconds": 999.999, "share": 0.999999},
        "rest": {"milliseconds": 0.0, "share": 0.0},
    }
    profile = {"steps": 2, "milliseconds": 1000.0, "phases": phases}
    assert [row[1:] for row in time_rows(profile)] == [
        *(("0.0010", "<0.1%"), ("1,000", ">99.9%"), ("0.00", "0.0%"), ("1,000", "100.0%")),
    ]
    assert [said for *_, said in time_bars(profile)] == [
        *("0.0010 ms, <1%", "1,000 ms, >99%", "0.00 ms, 0%")
    ]
