"""One page of all that the stages found, in Markdown, readable by itself."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import STAGES, file_of, read

Found = dict[str, Any]
ALTERNATIVES = ("definition", "compiled definition", "liger")


def write_page(out: Path) -> Path:
    """Make the page of a folder's JSONs; its path."""
    results = {stage.name: read(file_of(stage, out)) for stage in STAGES}
    name = results["environment"].get("found", {}).get("gpu", "unknown")
    path = out / f"gpu-{name.split(',')[0].lower().replace(' ', '-')}.md"
    path.write_text(page({name: found for name, found in results.items() if found}))
    return path


def page(results: dict[str, Found]) -> str:
    """The page of the stages' results, by name."""
    environment = results.get("environment", {}).get("found", {})
    lines = [f"# fastkd on {environment.get('gpu', 'an unknown device')}", ""]
    lines += [_made_by(environment), "", *_stages(results)]
    for name, section in SECTIONS.items():
        found = results.get(name, {}).get("found")
        if found:
            lines += ["", *section(found)]
    lines += ["", *_problems(results)]
    return "\n".join(lines).rstrip() + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table; what is None stays empty."""
    made = [head, ["---"] * len(head)]
    made += [["" if value is None else str(value) for value in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in made]


def _made_by(environment: Found) -> str:
    versions = environment.get("versions", {})
    parts = [f"{name} {found}" for name, found in versions.items()]
    for name in ("python", "cuda", "driver", "compute_capability", "gigabytes", "cores"):
        if environment.get(name) is not None:
            parts.append(f"{name.replace('_', ' ')} {environment[name]}")
    said = "Made by `python -m benchmarks.gpu`: " + (", ".join(parts) or "of nothing known") + "."
    if environment.get("missing"):
        said += " Not installed: " + ", ".join(environment["missing"]) + "."
    if "copy_gigabytes_per_second" in environment:
        said += (
            f" A copy reaches {environment['copy_gigabytes_per_second']} GB/s, a matrix product "
            f"{environment['teraflops']} Tflop/s."
        )
    return said


def _stages(results: dict[str, Found]) -> list[str]:
    rows = [
        (name, result["status"], f"{result['seconds']:.0f}", f"{result['limit_seconds']:.0f}")
        for name, result in results.items()
    ]
    return table(("stage", "", "seconds", "at most"), rows)


def _compilation(found: Found) -> list[str]:
    seconds = found["seconds"]
    rows = sorted(seconds.items(), key=lambda item: -item[1])[:5]
    head = f"{len(seconds)} calls in {found['processes']} processes; the slowest:"
    return ["## Compilation", "", head, "", *table(("call", "seconds"), rows)]


def _tests(found: Found) -> list[str]:
    head = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    lines = ["## Tests", "", f"{head}, of {found['collected']} in {found['files']} files."]
    if found["failures"]:
        rows = ((f"`{test}`", cell(said)) for test, said in found["failures"].items())
        lines += ["", *table(("failed", "because"), rows)]
    if found["reasons"]:
        rows = ((cell(reason), count) for reason, count in found["reasons"].items())
        lines += ["", *table(("skipped because", "tests"), rows)]
    return lines


def _kernels(found: Found) -> list[str]:
    rows = []
    # what failed at once has no times
    cases = {name: case for name, case in found.get("cases", {}).items() if case}
    for name, case in cases.items():
        times = case["times_the_op"]
        rows.append(
            (
                name,
                case["microseconds"],
                case.get("replayed_microseconds"),
                case["floor_microseconds"],
                f"{case['share_of_floor']:.0%}",
                case["host_microseconds"],
                *(times.get(other) for other in ALTERNATIVES),
                case["peak_megabytes"],
            )
        )
    head = ("call, forward and backward", "us on the device", "us in a graph", "floor us", "share")
    head += ("host us", *(f"times: {other}" for other in ALTERNATIVES), "MB at most")
    return [
        "## Kernels",
        "",
        "On the device: the sum of the call's kernels, inputs in no cache. The floor is what its "
        f"compulsory bytes and products take at {found['copy_gigabytes_per_second']} GB/s and "
        f"{found['teraflops']} Tflop/s, the share how much of it is reached. Times say how many "
        "times as long another way takes on the device.",
        "",
        *table(head, rows),
        "",
        "What takes longest in each:",
        "",
        *table(
            ("call", "us of its kernels"),
            ((name, _longest(case["kernels"], 4)) for name, case in cases.items()),
        ),
    ]


def _longest(kernels: dict[str, float], count: int) -> str:
    largest = sorted(kernels.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"`{cell(name[:60])}` {taken}" for name, taken in largest)


STEP_COLUMNS = (
    "milliseconds",
    "times the trivial step",
    "busy milliseconds",
    "busy share",
    "launches",
    "synchronisations",
    "copies to the host",
    "peak megabytes",
)


def _steps(found: Found) -> list[str]:
    rows = [
        (shape, name, *(step.get(column) for column in STEP_COLUMNS))
        for shape, steps in found["steps"].items()
        for name, step in steps.items()
    ]
    kernels = [
        (shape, name, _longest(step["kernels"], 6))
        for shape, steps in found["steps"].items()
        for name, step in steps.items()
        if "kernels" in step
    ]
    lines = ["## Training steps", "", "A BERT-base-shaped teacher and a 4 x 312 student.", ""]
    lines += table(("batch x tokens", "step", *STEP_COLUMNS), rows)
    if kernels:
        lines += ["", *table(("batch x tokens", "step", "us of its kernels"), kernels)]
    return lines


def _runs(found: Found) -> list[str]:
    said = (
        f"`fastkd distill` made {found['steps']} steps. Killed after step "
        f"{found['killed_after_step']} and continued, its losses are those of the uninterrupted "
        f"run but for {found['largest_difference']:.1g} (at most {found['tolerance']:g}). The "
        f"exported student: {found['student']}."
    )
    last = found["last_losses"]
    rows = [(name, f"{loss:.4g}", f"{last[name]:.4g}") for name, loss in _shared(found)]
    return ["## A run", "", said, "", *table(("loss", "first step", "last step"), rows)]


def _shared(found: Found) -> list[tuple[str, float]]:
    return [item for item in found["first_losses"].items() if item[0] in found["last_losses"]]


def _memcheck(found: Found) -> list[str]:
    return ["## Memory checker", "", f"{', '.join(found['called'])}: {found['said']}."]


def _problems(results: dict[str, Found]) -> list[str]:
    lines = []
    skipped = [(name, cell(s)) for name, result in results.items() for s in result["skipped"]]
    if skipped:
        lines += ["## Skipped", "", *table(("stage", "because"), skipped), ""]
    problems = [(name, said) for name, result in results.items() for said in result["problems"]]
    if problems:
        lines += ["## Failed", ""]
        # what a process said at its end stands in its JSON and its log
        rows = [(name, cell(said.splitlines()[0])) for name, said in problems]
        lines += [*table(("stage", "because"), rows), ""]
    return lines


def cell(text: str) -> str:
    """Text in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


SECTIONS: dict[str, Callable[[Found], list[str]]] = {
    "compilation": _compilation,
    "tests": _tests,
    "kernel_times": _kernels,
    "steps": _steps,
    "runs": _runs,
    "memcheck": _memcheck,
}
