"""The page `results/floor.md` from the numbers of `results/floor.json`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.chips import CHIPS
from benchmarks.machine_code import TARGETS

# the chip whose kernels are listed one by one
LISTED = "H100"
LETTERS = {"memory": "b", "products": "p", "exponentials": "e"}
INTRODUCTION = """# Floors and machine code

Made by `python -m benchmarks.floor --write`; nothing here was measured on a GPU.

**Floor**: what an op cannot be faster than, whatever computes it, in bf16, forward and backward:
the largest of compulsory bytes over peak bandwidth (`b`: inputs read once, gradients written once),
operations of the matrix products over the dense bf16 rate (`p`), and exponentials over the rate of
the special-function units (`e`: two a score or logit, one for either softmax). Products that run
as tf32 are counted at the bf16 rate: no real floor is lower. Clocks are those at which the
vendor's rate of products holds; a chip that runs at a higher one is faster by as much.

**Predicted**: what the compiled kernels of a call take if nothing is ever waited for, launch by
launch the largest of: instructions over four a cycle and multiprocessor (`slots`); those of the
special-function units (`special`), of integers and comparisons (`integer`) and of memory
(`memory`) over the lanes of these units; tensor-core operations of the code, padding included, over
the dense rate (`products`); bytes of the launch over bandwidth (`bytes`). Loops count as often as
the launch turns them. The library's products are at their own floor; torch's sums are left out.
Measured times lie above, see `benchmarks/README.md`. **Share** is the floor over the prediction:
the rest is what better kernels could win even if today's never waited.

There is no prediction for B200, whose tensor-core instructions do not name their shape, and for
MI300X, for which Triton has no disassembler; H200 runs the code of H100.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def markdown(result: Mapping[str, Any], ops: Iterable[str]) -> str:
    """The page of `results/floor.md`."""
    lines = [*INTRODUCTION.splitlines(), ""]
    head = ("chip", "TB/s", "dense bf16 TFLOP/s", "exponentials 1e12/s", "target", "source")
    lines += table(
        head,
        [
            (
                *(c.name, f"{c.bandwidth / 1e12:g}", f"{c.rate / 1e12:g}"),
                *(f"{c.exponentials / 1e12:.2f}", c.target[1], c.source),
            )
            for c in CHIPS
        ],
    )
    names = [chip.name for chip in CHIPS]
    for op in ops:
        lines += [f"## {op}", "", "Floor in microseconds.", ""]
        head = ("workload", "batch x tokens", "pairs", "MB", "GFLOP", "G exp", *names)
        floors = [row for row in result["floors"] if row["op"] == op]
        lines += table(head, [_floor_cells(row, names) for row in floors])
        rows = [row for row in result["predictions"] if row["op"] == op]
        chips = list(dict.fromkeys(row["chip"] for row in rows))
        lines += ["Floor / predicted microseconds, and the share.", ""]
        lines += table(("workload", "kind", "pairs", *chips), list(_share_cells(rows, chips)))
        lines += [f"The same on {LISTED} by kernel: microseconds, limit, warps at once.", ""]
        listed = [row for row in rows if row["chip"] == LISTED]
        lines += table(("workload", "kind", "kernels"), [_predicted_cells(row) for row in listed])
        lines += ["Registers / shared KiB, and the tensor-core instruction of its products.", ""]
        head = ("kernel", "dtype", "workloads", *(str(target[1]) for target in TARGETS))
        lines += table(head, list(_kernel_cells(op, result["machine_code"])))
    return "\n".join(lines)


def _floor_cells(row: Mapping[str, Any], names: Sequence[str]) -> list[object]:
    times = [f"{row['microseconds'][name]:.1f} {LETTERS[row['bound'][name]]}" for name in names]
    shape = f"{row['batch']} x {row['tokens']}"
    sizes = (f"{row['bytes'] / 1e6:.1f}", f"{row['flops'] / 1e9:.1f}")
    return [
        *(row["workload"], shape, row["pairs"], *sizes, f"{row['exponentials'] / 1e9:.2f}"),
        *times,
    ]


def _share_cells(rows: Sequence[Mapping[str, Any]], chips: Sequence[str]) -> Iterator[list[object]]:
    cells: dict[tuple[object, ...], dict[str, str]] = {}
    for row in rows:
        of_call = cells.setdefault((row["workload"], row["kind"], row["pairs"]), {})
        of_call[row["chip"]] = (
            f"{row['floor']:.0f} {LETTERS[row['bound']]} / {row['microseconds']:.0f}: "
            f"{row['share']:.2f}"
        )
    for (workload, kind, pairs), of_chips in cells.items():
        yield [workload, kind, pairs, *(of_chips[chip] for chip in chips)]


def _predicted_cells(row: Mapping[str, Any]) -> list[object]:
    parts = [
        f"{name.removeprefix(row['kind']).strip()} {one['microseconds']:.0f} {one['limit']} "
        f"{one['warps']}"
        for name, one in row["kernels"].items()
    ]
    if row["library"]:
        parts.append(f"library {row['library']:.0f}")
    return [row["workload"], row["kind"], "; ".join(parts)]


def _kernel_cells(op: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[list[object]]:
    """One line for each kernel of one launch configuration, with the workloads that share it."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        kinds = "+".join(kind.split(".")[0].removeprefix("v_") for kind in row["instructions"])
        size = f"{row['registers']} / {row['shared'] / 1024:.0f} {kinds}".strip()
        if row["spills"]:
            size += f", {row['spills']} bytes spilled"
        for workload in row["workloads"] if row["op"] == op else []:
            of_kernel = cells.setdefault((row["kernel"], row["dtype"], workload), {})
            of_kernel[str(row["target"][1])] = size
    groups: dict[tuple[str, ...], list[str]] = {}
    for (kernel, dtype, workload), of_targets in cells.items():
        line = (kernel, dtype, *(of_targets.get(str(target[1]), "") for target in TARGETS))
        groups.setdefault(line, []).append(workload)
    for (kernel, dtype, *of_targets), workloads in sorted(groups.items()):
        yield [kernel, dtype, ", ".join(workloads), *of_targets]
