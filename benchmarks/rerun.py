"""Figures of README and docs/measured.md measured again, and held against the committed results.

`python -m benchmarks.rerun [--only PART ...] [--keep FOLDER]`, which is `make bench`: the CPU's
benchmarks that need no data of others, in fewer rounds. What the README does not quote and takes
minutes (`LONG`) has to be asked for. A ratio has moved if it lies further from the committed one
than twice what lies between the quartiles of its rounds, the mean of those results that have them
(new ones all do); where neither has, than twice the range of the rounds. Memory has moved if it
differs by more than `MEMORY`. What has moved is named, and the exit code is 1. Milliseconds are not
compared: they are of a machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.processor import name_of
from benchmarks.slim import read_full, slim

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# part by which what torch allocates may differ, of which there are no rounds
MEMORY = 0.02
ROUNDS = "7"
TINYBERT, SIX_LAYERS = "bert-base-to-tinybert-4", "bert-base-to-6-layers"
# the kernels of docs/measured.md's table; those that take seconds a call are apart
QUOTED = {
    "attention_score_mse": (
        *(f"test_attention_score_mse[{TINYBERT}-{tokens}]" for tokens in (128, 512, 2048)),
        f"test_attention_score_mse[{SIX_LAYERS}-512]",
        "test_attention_score_mse[minilm-6-to-3-512]",
        "test_attention_score_mse[llama-like-2048]",
    ),
    "attention_divergence": (f"test_attention_divergence[{TINYBERT}-512-kl]",),
    "hidden": (
        f"test_hidden_mse[{TINYBERT}]",
        "test_hidden_mse[minilm-6-to-3]",
        f"test_hidden_cosine[{TINYBERT}]",
    ),
    "logits_divergence": ("test_logits_divergence[logits-32k-256-kl]",),
}
QUOTED_LONG = {
    "attention_divergence": ("test_attention_divergence[llama-like-2048-kl]",),
    "logits_divergence": (
        "test_logits_divergence[logits-32k-2048-width-256-kl]",
        "test_logits_divergence[logits-32k-2048-width-768-kl]",
    ),
}


Ends = tuple[float, float]


class Figure(NamedTuple):
    """A number of a result, and where its rounds lie, if it has rounds."""

    value: float
    rounds: Ends | None = None
    """The lowest and the highest."""
    quartiles: Ends | None = None


Figures = dict[str, Figure]
Quoted = dict[str, tuple[str, ...]]


class Part(NamedTuple):
    """A benchmark: what measures it, and what is read of its result."""

    committed: str
    command: tuple[str, ...]
    figures: Callable[[dict[str, Any]], Figures]
    environment: dict[str, str]
    """What it is told by variables; `{folder}` is where results go, as in the command."""


def of_training_step(found: dict[str, Any]) -> Figures:
    ratios = found["times the trivial step, median of paired rounds"]
    rounds = found.get("lowest and highest of the rounds", {})
    quartiles = found.get("quartiles of the rounds", {})
    return {
        name: Figure(value, _pair(rounds.get(name)), _pair(quartiles.get(name)))
        for name, value in ratios.items()
        if name != "trivial loss"
    }


def of_kernels(found: dict[str, Any], quoted: Quoted) -> Figures:
    made: Figures = {}
    for name in (name for names in quoted.values() for name in names):
        # one that failed has left nothing
        if (entry := found["benchmarks"].get(name)) is None:
            continue
        rounds, quartiles = (
            entry.get(f"{ends}_of_times_the_op", {}).get("definition")
            for ends in ("range", "quartiles")
        )
        made[f"{name}, definition / op"] = Figure(
            entry["times_the_op"]["definition"], _pair(rounds), _pair(quartiles)
        )
        for kind, size in entry["peak_megabytes"].items():
            made[f"{name}, MB of {kind}"] = Figure(size)
    return made


def of_compiled(found: dict[str, Any]) -> Figures:
    return {
        f"{shape}, eager / compiled": Figure(
            entry["eager step / compiled step, median of pairs"],
            _pair(entry.get("lowest and highest of pairs")),
            _pair(entry.get("quartiles of it")),
        )
        for shape, entry in found["rows x tokens"].items()
    }


def of_teacher_dtypes(found: dict[str, Any]) -> Figures:
    entries = {**found["rows x tokens"], "8 x 128, fp32": found["8 x 128, fp32"]}
    median = ", median of pairs"
    return {
        f"{shape}, {name}": Figure(
            entry[name + median],
            _pair(entry.get(f"{name}, lowest and highest")),
            _pair(entry.get(f"{name}, quartiles")),
        )
        for shape, entry in entries.items()
        for name in (key.removesuffix(median) for key in entry if key.endswith(median))
    }


def _pair(values: list[float] | None) -> Ends | None:
    return None if values is None else (values[0], values[1])


PYTEST = (sys.executable, "-m", "pytest", "--quiet")
STEP = "benchmarks/test_bench_training_step.py::test_losses_are_almost_free"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def kernels(quoted: Quoted) -> Part:
    """The part that measures some of the kernels."""
    tests = (
        f"benchmarks/test_bench_{file}.py::{name}"
        for file, names in quoted.items()
        for name in names
    )
    return Part(
        "kernels-cpu.json",
        (*PYTEST, "--benchmark-enable", "--benchmark-json={folder}/full.json", *tests),
        partial(of_kernels, quoted=quoted),
        {},
    )


PARTS = {
    **{
        f"step-{batch}x{tokens}": Part(
            f"training-step-cpu-{batch}x{tokens}.json",
            (*PYTEST, f"{STEP}[cpu-{batch}-{tokens}]"),
            of_training_step,
            {"FASTKD_BENCH_WRITE": "{folder}", "FASTKD_BENCH_ROUNDS": ROUNDS},
        )
        for batch, tokens in ((8, 128), (2, 512))
    },
    "kernels": kernels(QUOTED),
    "compiled": Part(
        "compiled-cpu.json",
        (
            *(sys.executable, "-m", "benchmarks.compiled", "--rounds", ROUNDS),
            *("--output", "{folder}/compiled-cpu.json"),
        ),
        of_compiled,
        ONE_THREAD,
    ),
    "teacher-dtypes": Part(
        "teacher-dtypes.json",
        (
            *(sys.executable, "-m", "benchmarks.teacher_dtypes", "--rounds", "3"),
            *("--output", "{folder}/teacher-dtypes.json"),
        ),
        of_teacher_dtypes,
        ONE_THREAD,
    ),
    "kernels-long": kernels(QUOTED_LONG),
}
LONG = ("teacher-dtypes", "kernels-long")


def moved(committed: Figure, now: Figure) -> bool:
    """Whether two figures lie further apart than chance takes them."""
    distance = abs(now.value - committed.value)
    both = (committed, now)
    # a median moves by less than a single round
    ends = [figure.quartiles for figure in both if figure.quartiles is not None] or [
        figure.rounds for figure in both if figure.rounds is not None
    ]
    if not ends:
        return distance > MEMORY * abs(committed.value)
    # of either result; one that does not say it is taken to spread as the other does
    return distance > 2 * fmean(high - low for low, high in ends)


def measure(part: Part, folder: Path) -> tuple[dict[str, Any] | None, int]:
    """A part's new result, `None` where it left none, and its exit code."""
    folder.mkdir()

    def filled(text: str) -> str:
        return text.replace("{folder}", str(folder))

    with (folder / "log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [filled(word) for word in part.command],
            cwd=ROOT,
            env={**os.environ, **{key: filled(value) for key, value in part.environment.items()}},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    path = folder / part.committed
    if (full := read_full(folder / "full.json")) is not None:
        path.write_text(json.dumps(slim([full])), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found, done.returncode


def compared(part: Part, found: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """A line for each figure, and whether it has moved."""
    old = part.figures(json.loads((RESULTS / part.committed).read_text(encoding="utf-8")))
    new = part.figures(found)
    for name, figure in old.items():
        now = new.get(name)
        if now is None:
            yield f"{name}: {figure.value:.3g} committed, not measured now", True
            continue
        has_moved = moved(figure, now)
        line = f"{name}: {figure.value:.3g} committed, {now.value:.3g} now{spread(now)}"
        yield line + (", MOVED" if has_moved else ""), has_moved


def spread(figure: Figure) -> str:
    """What is said of a figure's rounds: their quartiles, or the range where they have none."""
    ends = figure.quartiles or figure.rounds
    if ends is None:
        return ""
    return f" ({'quartiles' if figure.quartiles else 'rounds'} {ends[0]:.3g} to {ends[1]:.3g})"


def processors(part: Part, found: dict[str, Any]) -> str | None:
    """What the two results are of, unless that is one processor: reason enough to move."""
    committed = json.loads((RESULTS / part.committed).read_text(encoding="utf-8"))
    old, new = name_of(committed), name_of(found)
    return None if old == new else f"committed: {old}; now: {new}"


def run(arguments: list[str] | None = None) -> int:
    """Measure and compare; 1 if a figure has moved or a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rerun")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS))
    parser.add_argument("--keep", type=Path, help="new folder for the results and logs")
    given = parser.parse_args(arguments)
    if given.keep is not None:
        try:
            given.keep.mkdir(parents=True)
        except FileExistsError:
            parser.error(f"--keep {given.keep} is there already; give a new folder")
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if given.keep is None else given.keep
        for name in dict.fromkeys(given.only or (name for name in PARTS if name not in LONG)):
            start = time.perf_counter()
            found, code = measure(PARTS[name], folder / name)
            print(f"{name}, {time.perf_counter() - start:.0f} s", flush=True)
            if code:
                wrong.append(f"{name}: it ended with exit code {code}")
                print((folder / name / "log").read_text(encoding="utf-8")[-2000:])
            elif found is None:
                wrong.append(f"{name}: it left no result")
            if found is None:
                continue
            if (differ := processors(PARTS[name], found)) is not None:
                print(f"  {differ}", flush=True)
            for line, has_moved in compared(PARTS[name], found):
                print(f"  {line}", flush=True)
                wrong += [f"{name}: {line}"] if has_moved else []
    print("\n".join(["", "not as committed:", *wrong] if wrong else ["", "all as committed"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(run())
