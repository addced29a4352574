"""What a GPU cannot be faster than, and what the compiled kernels take at least.

`python -m benchmarks.floor` prints the tables, `--write` commits them to `results/floor.json` and
`results/floor.md`. The floor is of the op, whatever computes it: the largest of bytes over
bandwidth, products over their rate and exponentials over theirs (`costs.py`). The prediction is of
the machine code that a call launches (`issue.py`): what it takes if nothing is ever waited for.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

from benchmarks import costs, issue
from benchmarks.chips import CHIPS, Chip
from benchmarks.floor_page import markdown
from benchmarks.jobs import Job
from benchmarks.launches import OPS, Calls, recorded_calls
from benchmarks.machine_code import DISASSEMBLED, compile_all, known_key
from benchmarks.recording import Product
from benchmarks.workloads import PAIRS, LogitsWorkload, on_device

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16
DTYPE_NAME = "bfloat16"
PREDICTED = [chip for chip in CHIPS if chip.target in DISASSEMBLED]
# of a row, what its job says and its machine code does not
LABEL = ("op", "dtype", "target", "kernel", "function", "launch", "source", "workloads")


def floor_seconds(cost: costs.Cost, chip: Chip) -> tuple[float, str]:
    """The least time, and whether "memory", "products" or "exponentials" set it."""
    return max(
        (cost.bytes / chip.bandwidth, "memory"),
        (cost.flops / chip.rate, "products"),
        (cost.exponentials / chip.exponentials, "exponentials"),
    )


def cost_of(op: str, work: Any, pairs: int) -> costs.Cost:
    """Each op's cost is the function of its name."""
    function: Callable[..., costs.Cost] = getattr(costs, op)
    return function(work, pairs, DTYPE)


def floors() -> list[dict[str, Any]]:
    """One row for every op, device workload and number of pairs."""
    rows = []
    for op, module in OPS.items():
        for work in on_device(module.WORKLOADS):
            for pairs in (1,) if isinstance(work, LogitsWorkload) else PAIRS:
                cost = cost_of(op, work, pairs)
                bounds = {chip.name: floor_seconds(cost, chip) for chip in CHIPS}
                rows.append(
                    {
                        "op": op,
                        "workload": work.name,
                        "batch": work.batch,
                        "tokens": work.tokens,
                        "pairs": pairs,
                        **cost._asdict(),
                        "microseconds": {
                            name: round(1e6 * t, 2) for name, (t, _) in bounds.items()
                        },
                        "bound": {name: bound for name, (_, bound) in bounds.items()},
                    }
                )
    return rows


def predictions(machine_code: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for every kind of loss, device workload and chip: the least time of its launches."""
    codes = {known_key(row): row for row in machine_code if row["dtype"] == DTYPE_NAME}
    rows = []
    for op, module in OPS.items():
        for work in on_device(module.WORKLOADS):
            made = [recorded_calls(op, work, DTYPE, chip.target) for chip in PREDICTED]
            calls = made[0]
            kinds = {job.kind: None for job in calls.jobs if job.counted}
            for kind in kinds:
                cost = costs.of_kind(cost_of(op, work, calls.pairs), op, kind)
                for chip, of_chip in zip(PREDICTED, made, strict=True):
                    row = {"op": op, "kind": kind, "workload": work.name, "pairs": calls.pairs}
                    rows.append(row | predicted(of_chip, kind, cost, chip, codes))
    return rows


def predicted(
    calls: Calls, kind: str, cost: costs.Cost, chip: Chip, codes: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Any]:
    """Microseconds of every kernel of a call, of the library's products, of all; and the floor's
    share."""
    kernels = {
        job.name: of_job(job, codes[known_key(label(job, chip))], chip)
        for job in calls.jobs
        if job.kind == kind
    }
    library = 1e6 * sum(library_seconds(one, chip) for one in calls.products[kind])
    total = library + sum(kernel["microseconds"] for kernel in kernels.values())
    seconds, bound = floor_seconds(cost, chip)
    return {
        "chip": chip.name,
        "floor": round(1e6 * seconds, 2),
        "bound": bound,
        "microseconds": round(total, 2),
        "share": round(1e6 * seconds / total, 3),
        "library": round(library, 2),
        "kernels": kernels,
    }


def label(job: Job, chip: Chip) -> dict[str, Any]:
    return {"target": list(chip.target), "launch": job.digest(), "source": job.source()}


def of_job(job: Job, row: Mapping[str, Any], chip: Chip) -> dict[str, Any]:
    """Least microseconds of all launches of a kernel in one call, what limits them, and the warps
    that a multiprocessor holds."""
    warps = job.options["num_warps"]
    try:
        made = [issue.predicted(row, run, warps, chip) for run in job.runs]
    except ValueError as error:
        raise ValueError(f"{job.name} on {chip.name}: {error}") from error
    longest = max(made, key=lambda one: one.seconds)
    return {
        "microseconds": round(1e6 * sum(one.seconds for one in made), 2),
        "limit": longest.limit,
        "warps": issue.resident_warps(row["registers"], row["shared"], warps, chip),
    }


def library_seconds(product: Product, chip: Chip) -> float:
    """The least time of one of the library's products."""
    return max(product.flops / chip.rate, product.bytes / chip.bandwidth)


def grouped(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in their workload alone as one, with the list of `workloads`."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        rest = {name: value for name, value in row.items() if name != "workload"}
        merged = found.setdefault(json.dumps(rest), {**rest, "workloads": []})
        merged["workloads"].append(row["workload"])
    return list(found.values())


def committed_rows() -> dict[Any, dict[str, Any]]:
    """The committed machine code by its key: none that another Triton made."""
    path = RESULTS / "floor.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("triton") != triton.__version__:
        return {}
    return {
        known_key(row): {name: row[name] for name in row if name not in LABEL}
        for row in found["machine_code"]
    }


def committed_predictions() -> list[dict[str, Any]]:
    path = RESULTS / "floor.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return list(found.get("predictions", []))


def slower(
    before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    """A line for every call whose share of the floor fell."""
    shares = {_call(row): row["share"] for row in before}
    for row in after:
        share = shares.get(_call(row), 0.0)
        if row["share"] < share:
            yield f"{' '.join(map(str, _call(row)))}: share of the floor {share} -> {row['share']}"


def _call(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("op", "kind", "workload", "pairs", "chip"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/")
    parser.add_argument("--anew", action="store_true", help="compile what is committed too")
    parser.add_argument("--processes", type=int, default=2, help="2 unless given")
    given = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    known = {} if given.anew else committed_rows()
    made = compile_all(OPS, everything=True, processes=given.processes, known=known)
    rows = grouped(made)
    result: dict[str, Any] = {
        "triton": triton.__version__,
        "floors": floors(),
        "predictions": predictions(rows),
        "machine_code": rows,
    }
    page = markdown(result, OPS)
    if not given.write:
        print(page)
        return
    for line in slower(committed_predictions(), result["predictions"]):
        print(line)
    (RESULTS / "floor.json").write_text(as_json(result), encoding="utf-8")
    (RESULTS / "floor.md").write_text(page, encoding="utf-8")


def as_json(result: Mapping[str, Any]) -> str:
    """One row a line: readable diffs."""
    parts = [f' "triton": {json.dumps(result["triton"])}']
    parts += [
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in result[name]) + "\n ]"
        for name in ("floors", "predictions", "machine_code")
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
