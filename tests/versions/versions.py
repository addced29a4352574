"""Install the wheels beside the lowest and the newest packages, and see that they work.

    python tests/versions/versions.py --output tests/versions/results.md
    python tests/versions/versions.py --only 3.12-newest

Builds both wheels, and for each row has uv make a venv and install them with the extras, runs the
tests of `TESTS` from a copy that has neither package beside it, and ten steps of the demo.
`lowest` takes every bound of both pyproject.toml as it is written, `newest` what the index has.
UV_TORCH_BACKEND=cpu takes the CPU build of torch where its index can be reached; else a venv has 6
GB. A Python that is not there is skipped with a line. Exits with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what is lowest has wheels for the lowest Python; a newer one needs newer packages anyway
ROWS = ("3.11-lowest", "3.11-newest", "3.12-newest", "3.13-newest")
EXTRAS = ("demo", "onnx", "study", "tasks", "tensorboard", "trainer")
TOOLS = ("hypothesis", "POT", "pytest", "pytest-benchmark")
# what touches each dependency
TESTS = (
    "test_card",
    "test_data_readers",
    "test_deepspeed_config",
    "test_distiller",
    "test_kernels_errors",
    "test_kernels_hidden_mse",
    "test_layer_map",
    "test_metrics",
    "test_models",
    "test_onnx",
    "test_recipe",
    "test_recipe_fields",
    "test_tasks_glue",
)
SHOWN = ("torch", "triton", "transformers", "deepspeed", "datasets", "numpy", "pydantic")
UV = (sys.executable, "-m", "uv")
INSTALLED = """
import importlib.metadata, json, sys
names = json.loads(sys.argv[1])
print(json.dumps({name: importlib.metadata.version(name) for name in names}))
"""


class Failed(Exception):
    """A command of a row went wrong; the message is what it said last."""


@dataclass
class Outcome:
    """What became of a row."""

    row: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    tests: str = ""
    demo: str = ""
    problem: str = ""


def find_python(version: str) -> Path | None:
    """An interpreter of this version, on the path or of pyenv, whose shims uv can't start."""
    named = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [Path(named)] if named else []
    candidates += sorted(pyenv.glob(f"{version}.*/bin/python"))
    for candidate in candidates:
        asked = [str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def lowest() -> list[str]:
    """The lower bounds of both packages and their extras, as constraints."""
    lines: set[str] = set()
    for folder in (ROOT, ROOT / "kernels"):
        text = (folder / "pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
        lines |= set(project["dependencies"])
        for extra in EXTRAS:
            lines |= set(project.get("optional-dependencies", {}).get(extra, ()))
    bounds = (re.match(r"([\w.-]+)>=([^;,]+)", line) for line in lines)
    return sorted(f"{bound[1]}=={bound[2]}" for bound in bounds if bound)


class Row:
    """One venv, from nothing to its outcome.

    Args:
        name: version of Python and which packages.
        python: the interpreter.
        wheels: folder with both wheels.
        folder: an empty one, for the venv and what is run.
    """

    def __init__(self, name: str, python: Path, wheels: Path, folder: Path) -> None:
        self.name, self.python, self.wheels, self.folder = name, python, wheels, folder
        self.bin = folder / "venv" / "bin"
        self.work = folder / "work"

    def outcome(self) -> Outcome:
        """Install and try."""
        said = Outcome(self.name, self.name)
        try:
            self._install()
            said.python = self._run(str(self.bin / "python"), "--version").partition(" ")[2]
            printed = self._run(str(self.bin / "python"), "-c", INSTALLED, json.dumps(SHOWN))
            said.versions = json.loads(printed)
            self._copy_tests()
            said.tests = self._test()
            said.demo = self._demo()
        except Failed as failed:
            said.problem = str(failed)
        return said

    def _install(self) -> None:
        self.work.mkdir()
        self._run(*UV, "venv", "--quiet", "--python", str(self.python), str(self.bin.parent))
        (wheel,) = self.wheels.glob("fastkd-*.whl")
        wanted = [f"fastkd[{','.join(EXTRAS)}] @ {wheel.as_uri()}", *TOOLS]
        constraints = self.folder / "constraints.txt"
        constraints.write_text("\n".join(lowest()) if self.name.endswith("lowest") else "")
        where = ("--python", str(self.bin / "python"), "--find-links", str(self.wheels))
        self._run(*UV, "pip", "install", "--quiet", *where, "-c", str(constraints), *wanted)

    def _copy_tests(self) -> None:
        skip = shutil.ignore_patterns("__pycache__", "results")
        for name in ("tests", "benchmarks", "recipes"):
            shutil.copytree(ROOT / name, self.work / name, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", self.work)

    def _test(self) -> str:
        files = [f"tests/{name}.py" for name in TESTS]
        printed = self._run(
            str(self.bin / "python"), "-m", "pytest", "--quiet", "--no-header", *files
        )
        # how long it took is the machine's
        return printed.splitlines()[-1].partition(" in ")[0]

    def _demo(self) -> str:
        overrides = ("train.steps=10", "train.warmup_steps=1", "train.evaluate_every=10")
        self._run(str(self.bin / "fastkd"), "distill", "recipes/demo.yaml", *overrides)
        summary = json.loads((self.work / "runs" / "demo" / "summary.json").read_text())
        before, after = (summary[when]["total"] for when in ("before", "after"))
        if not after < before:
            raise Failed(f"the demo's loss went from {before:.4g} to {after:.4g}")
        return f"{before:.4g} to {after:.4g}"

    def _run(self, *command: str) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command,
            cwd=self.work,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            raise Failed(f"{Path(command[0]).name} {command[1]} ...: " + " / ".join(lines[-5:]))
        return done.stdout.strip()


def table(outcomes: list[Outcome], command: str) -> str:
    """The page of results."""
    rows = [
        "# Versions",
        "",
        f"`{command}`: {sum(not one.problem for one in outcomes)} of {len(outcomes)} rows passed. "
        f"{platform.system()} on {platform.machine()}, without a GPU.",
        "",
        f"| packages | Python | {' | '.join(SHOWN)} | tests | loss of the demo in ten steps |",
        f"|---|---|{'---|' * len(SHOWN)}---|---|",
    ]
    for one in outcomes:
        versions = " | ".join(one.versions.get(name, "") for name in SHOWN)
        packages = one.row.partition("-")[2]
        last = one.problem.replace("|", "/") or one.demo
        rows.append(f"| {packages} | {one.python} | {versions} | {one.tests} | {last} |")
    rows += ["", "Constraints of `lowest`: " + ", ".join(f"`{line}`" for line in lowest()) + "."]
    return "\n".join(rows) + "\n"


def build(folder: Path) -> None:
    """Put both wheels into a folder."""
    for project in (ROOT, ROOT / "kernels"):
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(project)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Work through the rows."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", choices=ROWS, action="append", help="a row; all if not given")
    parser.add_argument("--output", type=Path, help="page of results to write")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="fastkd-versions-") as name:
        wheels = Path(name) / "wheels"
        build(wheels)
        for row in arguments.only or ROWS:
            python = find_python(row.partition("-")[0])
            if python is None:
                print(f"{row}: skipped, no Python {row.partition('-')[0]} here", flush=True)
                continue
            folder = Path(name) / row
            folder.mkdir()
            began = time.monotonic()
            outcome = Row(row, python, wheels, folder).outcome()
            minutes = (time.monotonic() - began) / 60
            said = outcome.problem or f"{outcome.tests}; demo {outcome.demo}"
            print(f"{row}: {said} ({minutes:.0f} min)", flush=True)
            outcomes.append(outcome)
            # a venv with torch is 1 to 6 GB
            shutil.rmtree(folder)
    if arguments.output is not None:
        command = " ".join(["python", "tests/versions/versions.py", *sys.argv[1:]])
        arguments.output.write_text(table(outcomes, command), encoding="utf-8")
    sys.exit(any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    main()
