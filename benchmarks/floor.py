"""What a GPU cannot be faster than: a table for measured times to stand beside.

`python -m benchmarks.floor` prints it, `--write` commits it to `results/floor.json` and
`results/floor.md`. Registers, shared memory and instructions come from compiling every kernel
(minutes the first time); times from `costs.py` and the vendors' numbers: the floor is the larger
of bytes over bandwidth and operations over rate.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs

from benchmarks import costs
from benchmarks.launches import OPS
from benchmarks.machine_code import TARGETS, Target, compile_all
from benchmarks.workloads import PAIRS, LogitsWorkload, on_device

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16


class Chip(NamedTuple):
    """Peak bytes and dense bf16 operations a second, as the vendor publishes them."""

    name: str
    target: Target
    bandwidth: float
    rate: float
    source: str


CHIPS = (
    Chip("A100", ("cuda", 80), 2.039e12, 312e12, "NVIDIA A100 80GB datasheet, SXM"),
    Chip("H100", ("cuda", 90), 3.35e12, 989.5e12, "NVIDIA H100 datasheet, SXM"),
    Chip("H200", ("cuda", 90), 4.8e12, 989.5e12, "NVIDIA H200 datasheet, SXM"),
    Chip("B200", ("cuda", 100), 8e12, 2.25e15, "NVIDIA HGX B200 datasheet, one GPU"),
    Chip("MI300X", ("hip", "gfx942"), 5.3e12, 1307.4e12, "AMD Instinct MI300X data sheet"),
)


def floor_seconds(cost: costs.Cost, chip: Chip) -> tuple[float, str]:
    """The least time, and whether "memory" or "products" set it."""
    moving, multiplying = cost.bytes / chip.bandwidth, cost.flops / chip.rate
    return max((moving, "memory"), (multiplying, "products"))


def floors() -> list[dict[str, Any]]:
    """One row for every op, device workload and number of pairs."""
    rows = []
    for op, module in OPS.items():
        # each op's cost is the function of its name
        cost_of: Callable[..., costs.Cost] = getattr(costs, op)
        for work in on_device(module.WORKLOADS):
            for pairs in (1,) if isinstance(work, LogitsWorkload) else PAIRS:
                cost = cost_of(work, pairs, DTYPE)
                bounds = {chip.name: floor_seconds(cost, chip) for chip in CHIPS}
                rows.append(
                    {
                        "op": op,
                        "workload": work.name,
                        "batch": work.batch,
                        "tokens": work.tokens,
                        "pairs": pairs,
                        "bytes": cost.bytes,
                        "flops": cost.flops,
                        "microseconds": {
                            name: round(1e6 * t, 2) for name, (t, _) in bounds.items()
                        },
                        "bound": {name: bound for name, (_, bound) in bounds.items()},
                    }
                )
    return rows


def grouped(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in their workload alone as one, with the list of `workloads`."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        rest = {name: value for name, value in row.items() if name != "workload"}
        merged = found.setdefault(json.dumps(rest), {**rest, "workloads": []})
        merged["workloads"].append(row["workload"])
    return list(found.values())


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def markdown(result: dict[str, Any]) -> str:
    """The page of `results/floor.md`."""
    lines = [
        "# Floors and machine code",
        "",
        "Made by `python -m benchmarks.floor --write`; nothing here was measured on a GPU.",
        "",
        "**Floor**: the larger of compulsory bytes over peak bandwidth (inputs read once,",
        "gradients written once, bf16, forward and backward) and operations of the matrix",
        "products over the dense bf16 rate (`b` where bytes decide, `p` where products do).",
        "Products that run as tf32 are counted at the bf16 rate: no real floor is lower.",
        "",
    ]
    peaks = [
        (c.name, f"{c.bandwidth / 1e12:g}", f"{c.rate / 1e12:g}", c.target[1], c.source)
        for c in CHIPS
    ]
    lines += table(("chip", "TB/s", "dense bf16 TFLOP/s", "target", "source"), peaks)
    names = [chip.name for chip in CHIPS]
    for op in OPS:
        lines += [f"## {op}", "", "Floor in microseconds.", ""]
        head = ("workload", "batch x tokens", "pairs", "MB", "GFLOP", *names)
        lines += table(
            head, [_floor_cells(row, names) for row in result["floors"] if row["op"] == op]
        )
        lines += ["Registers / shared KiB, and the tensor-core instruction of its products.", ""]
        head = ("kernel", "dtype", "workloads", *(str(target[1]) for target in TARGETS))
        lines += table(head, list(_kernel_cells(op, result["machine_code"])))
    return "\n".join(lines)


def _floor_cells(row: dict[str, Any], names: Sequence[str]) -> list[object]:
    times = [
        f"{row['microseconds'][name]:.1f} {row['bound'][name][0].replace('m', 'b')}"
        for name in names
    ]
    shape = f"{row['batch']} x {row['tokens']}"
    sizes = (f"{row['bytes'] / 1e6:.1f}", f"{row['flops'] / 1e9:.1f}")
    return [row["workload"], shape, row["pairs"], *sizes, *times]


def _kernel_cells(op: str, rows: Sequence[dict[str, Any]]) -> Iterator[list[object]]:
    """One line for each kernel of one launch configuration, with the workloads that share it."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        kinds = "+".join(kind.split(".")[0].removeprefix("v_") for kind in row["instructions"])
        size = f"{row['registers']} / {row['shared'] / 1024:.0f} {kinds}".strip()
        for workload in row["workloads"] if row["op"] == op else []:
            of_kernel = cells.setdefault((row["kernel"], row["dtype"], workload), {})
            of_kernel[str(row["target"][1])] = size
    groups: dict[tuple[str, ...], list[str]] = {}
    for (kernel, dtype, workload), of_targets in cells.items():
        line = (kernel, dtype, *(of_targets[str(target[1])] for target in TARGETS))
        groups.setdefault(line, []).append(workload)
    for (kernel, dtype, *of_targets), workloads in sorted(groups.items()):
        yield [kernel, dtype, ", ".join(workloads), *of_targets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/")
    parser.add_argument("--processes", type=int, default=2, help="2 unless given")
    given = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    rows = grouped(compile_all(OPS, everything=True, processes=given.processes))
    result = {"floors": floors(), "machine_code": rows}
    page = markdown(result)
    if not given.write:
        print(page)
        return
    # one row a line: readable diffs
    parts = (
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in result[name]) + "\n ]"
        for name in result
    )
    (RESULTS / "floor.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    (RESULTS / "floor.md").write_text(page)


if __name__ == "__main__":
    main()
