"""What `make check` leaves out: files that are there, and tests that start processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SLOW_FILES, _reaches
from tiny_runs import run_command
from tiny_training import fastkd, run_whole


def _through_a_helper(recipe: Path) -> None:
    run_whole("distill", recipe)


def _directly() -> None:
    assert run_command("doctor").returncode == 0


def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastkd("doctor", monkeypatch=monkeypatch) == 0


def test_a_test_that_starts_a_process_is_found_also_through_helpers() -> None:
    assert _reaches([_directly]) and _reaches([_through_a_helper])
    assert _reaches([_in_this_process, _directly])
    assert not _reaches([_in_this_process]) and not _reaches([None, Path])


def test_slow_files_are_there() -> None:
    assert {path.stem for path in Path(__file__).parent.glob("test_*.py")} >= SLOW_FILES


@pytest.mark.slow
def test_the_mark_may_stand_on_a_test(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("slow") is not None
