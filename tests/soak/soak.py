"""Disturb tiny runs at random until the minutes are over, and see that each one ends as it should.

    python tests/soak/soak.py --seed 0 --minutes 5 --output tests/soak/results.md
    python tests/soak/soak.py --only distill:kill-call:17

Draws a scenario and a fault, strikes, runs the same command again, and compares weights and losses
with those of an undisturbed run. Exits with 1 if anything went wrong, and says how to repeat it;
what is killed in time is struck at nearly the same moment again, everything else at the same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import platform
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from soak_cases import FAULTS, OUTCOMES, Case, Outcome, Reference, make_reference, try_case
from soak_processes import Launcher
from soak_scenarios import SCENARIOS

PACKAGES = ("fastkd", "torch", "transformers", "deepspeed", "datasets", "safetensors")


def cases(seed: int) -> Iterator[Case]:
    """Endless cases, the same ones for a seed."""
    draw = random.Random(seed)
    weights = [scenario.weight for scenario in SCENARIOS.values()]
    for number in itertools.count():
        (name,) = draw.choices(list(SCENARIOS), weights)
        yield Case(name, draw.choice(FAULTS), 100_000 * seed + number)


class Soak:
    """Works through cases on several workers.

    Args:
        folder: for everything that is written.
        chosen: the cases.
        seconds: no case is begun after so many.
    """

    def __init__(self, folder: Path, chosen: Iterator[Case], seconds: float) -> None:
        self.folder, self.chosen = folder, chosen
        self.deadline = time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._locks = {name: threading.Lock() for name in SCENARIOS}
        self._references: dict[str, Reference] = {}

    def work(self, _number: int) -> None:
        """What a worker does."""
        launcher = Launcher()
        try:
            while time.monotonic() < self.deadline and (case := self._next()):
                reference = self._reference(case.scenario, launcher)
                place = self.folder / str(case).replace(":", "-")
                outcome = try_case(case, reference, place, launcher)
                self._note(outcome, place)
        finally:
            launcher.close()

    def _next(self) -> Case | None:
        with self._lock:
            return next(self.chosen, None)

    def _reference(self, name: str, launcher: Launcher) -> Reference:
        with self._locks[name]:
            if name not in self._references:
                place = self.folder / f"reference-{name}"
                self._references[name] = make_reference(name, place, launcher)
        return self._references[name]

    def _note(self, outcome: Outcome, place: Path) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            mark = "" if outcome.is_right else "WRONG: "
            print(f"{mark}{outcome.case}: {outcome.kind} ({outcome.detail})", flush=True)
        if outcome.is_right:
            shutil.rmtree(place)


def table(outcomes: list[Outcome]) -> str:
    """Counts as Markdown: scenarios and faults down, outcomes across."""
    counts = Counter((each.case.scenario, each.case.fault, each.kind) for each in outcomes)
    lines = [
        f"| scenario | fault | {' | '.join(OUTCOMES)} |",
        "|---|---|" + "---:|" * len(OUTCOMES),
    ]
    for name, fault in itertools.product(SCENARIOS, FAULTS):
        row = [counts[name, fault, kind] for kind in OUTCOMES]
        if any(row):
            lines.append(f"| {name} | {fault} | {' | '.join(str(n or '') for n in row)} |")
    totals = [sum(each.kind == kind for each in outcomes) for kind in OUTCOMES]
    lines.append(f"| all | all | {' | '.join(map(str, totals))} |")
    return "\n".join(lines)


def page(outcomes: list[Outcome], seed: int, minutes: float, workers: int) -> str:
    """The results as a Markdown file."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    wrong = [each for each in outcomes if not each.is_right]
    lines = [
        "# Soak",
        "",
        f"`python tests/soak/soak.py --seed {seed} --minutes {minutes:g} --workers {workers}`: "
        f"{len(outcomes)} cases, {len(wrong)} of them wrong. "
        f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores, "
        f"{platform.system()}.",
        "",
        table(outcomes),
        *(["", "Wrong, each repeated with `--only CASE`:", ""] if wrong else []),
        *(f"- `{each.case}`: {each.kind}" for each in wrong),
    ]
    return "\n".join(lines) + "\n"


def _case(text: str) -> Case:
    scenario, fault, seed = text.split(":")
    if scenario not in SCENARIOS or fault not in FAULTS:
        raise ValueError
    return Case(scenario, fault, int(seed))


def main() -> int:
    """Soak; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--only", type=_case, help="SCENARIO:FAULT:SEED, one case")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fastkd-soak-"))
    chosen = iter([given.only]) if given.only else cases(given.seed)
    soak = Soak(folder, chosen, 60 * given.minutes)
    workers = 1 if given.only else given.workers
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(soak.work, number) for number in range(workers)]:
            future.result()
    print(f"\n{table(soak.outcomes)}")
    if given.output:
        text = page(soak.outcomes, given.seed, given.minutes, workers)
        given.output.write_text(text, encoding="utf-8")
    wrong = [each for each in soak.outcomes if not each.is_right]
    for each in wrong:
        print(f"repeat with: python tests/soak/soak.py --only {each.case}")
    if wrong:
        print(f"what they left is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
