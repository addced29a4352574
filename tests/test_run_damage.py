"""Damage to what a run has written about itself is one line that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_recipe

import fastkd
from fastkd.errors import UserError
from fastkd.reporting.report import loss_rows, score_tables
from fastkd.training import loop
from fastkd.training.checkpoint import Checkpoints
from fastkd.training.metric_lines import make_line
from fastkd.training.run_folder import RunFolder
from fastkd.training.summary import _evaluations

BROKEN = (b"{", b"[]", b"3", b"\xff\xfe{}", b"\0\0\0\0", b"[" * 100_000, b'{"step": 1')


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_summary(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    run.summary.write_bytes(content)
    with pytest.raises(UserError, match=r"summary.json is damaged .*; remove it") as raised:
        run.read_summary()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [*BROKEN, b"", b'{"loss": 1}', b'{"step": 1}'])
def test_a_broken_line_of_metrics(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    whole = b'{"kind": "train", "step": 1}\n'
    run.metrics.write_bytes(whole + content + b"\n" + whole)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged .*; repair") as raised:
        run.rewind_metrics(1)
    assert "\n" not in str(raised.value)
    # the last line of a run that was killed
    run.metrics.write_bytes(whole + content)
    assert run.read_metrics() == [{"kind": "train", "step": 1}]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_environment(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    run.environment.write_bytes(content)
    with pytest.raises(UserError, match=r"environment.json is damaged .*; put it back"):
        _ = run.started_in


def test_a_lost_line_of_an_evaluation_is_missed_and_another_one_is_not_taken(
    tmp_path: Path,
) -> None:
    def judged(step: int) -> dict[str, Any]:
        scores = {"score": step / 10, "scores": {"dev": {"accuracy": step / 10}}}
        return {"total": step + 0.5, "losses": {"hidden": step + 0.5}, **scores}

    def found(*steps: int) -> tuple[Any, ...]:
        run = RunFolder(tmp_path)
        run.metrics.unlink(missing_ok=True)
        for step in steps:
            run.append_metrics(make_line("heldout", step, judged(step)))
        return _evaluations(run, 4)

    assert found(0, 2, 4, 6) == (judged(0), judged(4), None)
    before, after, _ = found(2, 4, 6)
    assert before is None and after == judged(4)
    for steps in ((0, 2), (0, 2, 6), ()):
        with pytest.raises(UserError, match="the evaluation of step 4 is missing, whose student"):
            found(*steps)
    # the tables of a run that lost its first one
    lost = {"before": before, "after": after}
    assert loss_rows(lost) == [("hidden", "-", "4.5"), ("total, weighted", "-", "4.5")]
    assert [columns for columns, _ in score_tables(lost)] == [("", "after")]


def test_a_run_that_lost_its_first_evaluation_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, made = make_recipe(tmp_path), list[str]()
    given = {"train.steps": 2, "train.warmup_steps": 0, "train.checkpoint_every": 2}
    sync, save = RunFolder.sync_metrics, Checkpoints.save

    def noted(name: str, function: Callable[..., None]) -> Callable[..., None]:
        return lambda *those: (made.append(name), function(*those))[1]

    monkeypatch.setattr(RunFolder, "sync_metrics", noted("metrics", sync))
    monkeypatch.setattr(Checkpoints, "save", noted("checkpoint", save))

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(loop, "summarise", stopped)
        fastkd.distill(recipe, given, quiet=True)
    # a power cut takes no line that a checkpoint goes on from
    assert made == ["metrics", "checkpoint"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines(keepends=True)
    assert '"heldout", "step": 0' in first
    metrics.write_text("".join(others))
    result = fastkd.distill(recipe, given, resume=True, quiet=True)
    assert result.summary["before"] is None and result.losses_after
    assert "<td>-</td>" in (tmp_path / "run" / "report.html").read_text()
