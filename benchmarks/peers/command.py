"""`python -m benchmarks.peers`: what it measures, in which order, and where that goes."""

from __future__ import annotations

import argparse
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, report, set_threads
from benchmarks.peers.groups import FASTKD, JOBS, PEERS, groups
from benchmarks.peers.memory import Job, peaks
from benchmarks.peers.page import write_page
from benchmarks.peers.rows import (
    DRAWS,
    Case,
    Group,
    Measured,
    Row,
    Step,
    bounds,
    check_equal,
    first_step,
)
from benchmarks.training_step import dtype_on, paired_ratios, seconds_in_turn
from fastkd.extras import is_installed

RESULTS = Path(__file__).parents[1] / "results"
README = RESULTS.parent / "README.md"
# rounds of a case: as many as take about so many seconds
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 40.0, 4, 11
# of the rows that say how far rounding goes, where a step takes seconds
FEW_DRAWS, FEW_FROM = 2, 1024


def agreement(rows: list[Row], case: Case, steps: dict[str, Step]) -> dict[str, Any]:
    """Of each loss: what its rows have in common, after their first step.

    Raises:
        AssertionError: they have not.
    """
    measured = {key: first_step(step) for key, step in steps.items()}
    found = {}
    for loss in dict.fromkeys(row.loss for row in rows):
        members = [row for row in rows if row.loss == loss]
        (plain,) = (row for row in members if row.plain)
        draws = FEW_DRAWS if case.tokens > FEW_FROM else DRAWS
        exact, bound = bounds(plain, case, draws)
        own = {row.key: measured[row.key] for row in members}
        largest = check_equal(own, exact, bound, f"{case.size}, {case.shape}")
        found[loss] = {
            kind: {
                "value": getattr(exact, kind),
                "bound": getattr(bound, kind),
                "largest distance / bound": round(largest[kind], 3),
            }
            for kind in Measured._fields
        }
    return found


def measured(
    group: Group, number: int, memory: dict[Job, float], rounds: int | None
) -> dict[str, Any]:
    """One case of a group: rows that agree, timed in turn."""
    case, rows = group.cases[number], group.present
    steps = {row.key: row.make(case) for row in rows}
    agreed = agreement(rows, case, steps)
    runs = {key: step.run for key, step in steps.items()}
    first = seconds_in_turn(runs, case.device, 1)
    taken = sum(values[0] for values in first.values())
    found = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(SECONDS / taken)))
    times = seconds_in_turn(runs, case.device, rounds or found)
    made: dict[str, Any] = {}
    for row in rows:
        ratios = paired_ratios(times, f"{FASTKD}, {row.loss}")[row.key]
        made[row.key] = {
            "row": row.name,
            "loss": row.loss,
            "seconds": statistics.median(times[row.key]),
            "times fastkd": statistics.median(ratios),
            "lowest and highest of the rounds": [min(ratios), max(ratios)],
            "peak megabytes": round(memory[Job(group.name, number, row.key)], 1),
        }
    return {
        **case._asdict(),
        "rounds": len(next(iter(times.values()))),
        "agreement": agreed,
        "rows": made,
    }


def jobs_of(chosen: list[Group]) -> list[Job]:
    return [
        Job(group.name, number, row.key)
        for group in chosen
        for number in range(len(group.cases))
        for row in group.present
    ]


def versions() -> dict[str, str]:
    """Of what the rows run, where it is installed."""
    packages = {"transformers": "transformers", **dict(PEERS.values())}
    return {name: version(name) for name, module in packages.items() if is_installed(module)}


def run(arguments: list[str] | None = None) -> None:
    """Measure, print, and write where a file is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--only", nargs="+", choices=tuple(JOBS))
    parser.add_argument("--rounds", type=int, help=f"of a case; as many as fit into {SECONDS:g} s")
    parser.add_argument("--output", type=Path, help="file of the result")
    parser.add_argument("--page", action="store_true", help="put its tables into the README here")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no GPU; leave it out, or run it on one")
    if given.rounds is not None and given.rounds < 1:
        parser.error(f"--rounds {given.rounds}; give at least 1")
    set_threads()
    rounds = given.rounds or (2 if given.quick else None)
    chosen = [
        g for g in groups(given.device, quick=given.quick) if g.name in (given.only or g.name)
    ]
    jobs = jobs_of(chosen)
    memory = {}
    numbers = peaks(jobs, given.device, torch.get_num_threads(), quick=given.quick)
    for job, peak in zip(jobs, numbers, strict=True):
        memory[job] = peak
        print(f"{job.row} of {job.group}, case {job.case}: {peak:.0f} MB", file=sys.stderr)
    found: dict[str, Any] = {
        "what": "the same optimiser step through fastkd and its peers",
        **machine(),
        "device": given.device,
        "dtype": str(dtype_on(given.device)).removeprefix("torch."),
        "packages": versions(),
        "not installed": [name for name, (_, module) in PEERS.items() if not is_installed(module)],
        "command": "make peers" if given.page else "python -m benchmarks.peers",
        "groups": {},
    }
    if given.device == "cuda":
        found["processor"] = torch.cuda.get_device_name()
    for group in chosen:
        cases = []
        for number, case in enumerate(group.cases):
            print(f"{group.name}: {case.size}, {case.shape}", file=sys.stderr)
            cases.append(measured(group, number, memory, rounds))
        found["groups"][group.name] = {
            "what": group.what,
            "cannot": group.cannot,
            "cases": cases,
        }
    report(found, given.output or (default_output(given.device) if given.page else None))
    if given.page:
        write_page(found, README)


def default_output(device: str) -> Path:
    """Named after the GPU, or `cpu`."""
    chip = "cpu"
    if device == "cuda":
        chip = torch.cuda.get_device_name().lower().replace(" ", "-")
    return RESULTS / f"peers-{chip}.json"
