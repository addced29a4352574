"""A pytest plugin that writes each outcome at once: `-p benchmarks.gpu.recorder`.

One JSON line with how many tests there are, then one a test, go to the file that `FASTKD_OUTCOMES`
names, so that of tests that were ended it is known which had run by then.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "FASTKD_OUTCOMES"


class Outcomes:
    """One line for a test that passed, failed or was skipped, and for a module that can't load."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._collected = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._count(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        # each worker collects all of them
        self._count(len(ids))

    def _count(self, tests: int) -> None:
        if tests != self._collected:
            self._collected = tests
            self._write({"collected": tests})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # a fixture may fail or skip a test; what passes is its call
        if report.when == "call" or not report.passed:
            self._add(report.nodeid, report.outcome, report.duration, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report.nodeid, "failed", 0.0, report)

    def _add(self, test: str, outcome: str, seconds: float, report: Any) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "said": ""}
        if outcome != "passed":
            line["said"] = said(report.longrepr)
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def said(found: Any) -> str:
    """The one line of a failure or of a skip."""
    if isinstance(found, tuple):
        return str(found[-1]).removeprefix("Skipped: ")
    crash = getattr(found, "reprcrash", None)
    text = str(found) if crash is None else crash.message
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    # an error's first line names it; of what is no error the last one does
    return lines[-1 if crash is None else 0].strip()[:300]


def pytest_configure(config: pytest.Config) -> None:
    # a worker's reports come to the process that started it
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(os.environ[VARIABLE])))
