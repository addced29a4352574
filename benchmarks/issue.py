"""How long compiled code takes at least to be issued: its instructions, on a chip's own units.

A multiprocessor has four schedulers, and each starts one instruction of one warp a cycle; units
that serve fewer lanes than that take longer. Products count by their operations. What is waited
for, memory and one instruction's result for the next, is not in it: a kernel takes longer where
too few warps are there to cover that.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.chips import Chip
from benchmarks.jobs import Loop, Run
from benchmarks.sass import Code, CodeLoop, Work

# the units that are counted, and what they execute
UNITS = {
    "special": ("MUFU",),
    "integer": (
        *("IADD3", "VIADD", "LOP3", "PLOP3", "SHF", "LEA", "PRMT"),
        *("ISETP", "FSETP", "FMNMX", "IMNMX", "VIMNMX", "IABS"),
    ),
    "memory": ("LDG", "LDGSTS", "STG", "LDS", "LDSM", "STS", "STSM", "SHFL", "ATOMS"),
}
LANES_OF_WARP = 32
SCHEDULERS = 4


class Predicted(NamedTuple):
    """Seconds of one launch by what limits it, at least."""

    slots: float
    special: float
    integer: float
    memory: float
    products: float
    bytes: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def limit(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))


def summary(code: Code) -> dict[str, Any]:
    """Counts of a warp: `slots` in all, by unit, `flops` of tensor cores; the same of `loops`."""
    return {**_counts(code.once), "loops": [_loop_counts(loop) for loop in code.loops]}


def _loop_counts(loop: CodeLoop) -> dict[str, Any]:
    inside = [_loop_counts(one) for one in loop.inside]
    return {**_counts(loop.work), "branched": _counts(loop.branched), "loops": inside}


def _counts(work: Work) -> dict[str, int]:
    units = {unit: sum(work.kinds[kind] for kind in kinds) for unit, kinds in UNITS.items()}
    return {"slots": work.kinds.total(), **units, "flops": work.products}


def executed(code: Mapping[str, Any], loops: Sequence[Loop]) -> dict[str, float]:
    """Counts of one warp of a program whose loops turn as often as `loops` say."""
    total = {name: float(code[name]) for name in ("slots", *UNITS, "flops")}
    for one, loop in _matched(code["loops"], loops):
        for name, count in executed(one, loop.inside).items():
            skipped = (1.0 - loop.branched) * one["branched"][name]
            total[name] += loop.times * (count - skipped)
    return total


def _matched(
    found: Sequence[Mapping[str, Any]], loops: Sequence[Loop]
) -> Iterator[tuple[Mapping[str, Any], Loop]]:
    """Each loop of the code with how often it turns; an error where they do not fit.

    Where the code has more than the kernel, the compiler has unrolled: a loop that does a whole
    number of turns at once, as its loads and stores say, and one for the turns that are left.
    """
    spare, place = len(found) - len(loops), 0
    for loop in loops:
        one = found[place] if place < len(found) else None
        turns = _turns_at_once(found[place : place + 2]) if spare > 0 else 1
        if one is not None and turns > 1:
            whole = loop.times // turns
            yield one, loop._replace(times=whole)
            yield found[place + 1], loop._replace(times=loop.times - whole * turns)
            place, spare = place + 2, spare - 1
        elif one is not None:
            yield one, loop
            place += 1
    if place != len(found) or len(found) < len(loops):
        raise ValueError(
            f"the machine code has {len(found)} loops in a row where the kernel has {len(loops)}"
        )


def _turns_at_once(pair: Sequence[Mapping[str, Any]]) -> int:
    """How many turns of the second loop one turn of the first is; 1 where it is none."""
    if len(pair) < 2 or not pair[1]["memory"] or pair[0]["loops"] or pair[1]["loops"]:
        return 1
    turns, rest = divmod(pair[0]["memory"], pair[1]["memory"])
    return int(turns) if rest == 0 and pair[0]["slots"] > pair[1]["slots"] else 1


def predicted(row: Mapping[str, Any], run: Run, num_warps: int, chip: Chip) -> Predicted:
    """The least time of one launch of the kernel of `row`, of `machine_code.compiled`."""
    counts = executed(row["code"], run.loops)
    # of equal programs, one multiprocessor gets a whole number
    busiest = run.programs / chip.multiprocessors
    busiest = math.ceil(busiest) if run.even else busiest
    cycle = busiest * num_warps / chip.clock
    units = {unit: counts[unit] * LANES_OF_WARP / chip.lanes[unit] * cycle for unit in UNITS}
    return Predicted(
        slots=counts["slots"] / SCHEDULERS * cycle,
        **units,
        products=counts["flops"] * cycle / chip.flops_of_cycle,
        bytes=run.bytes / chip.bandwidth,
    )


def resident_warps(registers: int, shared: int, num_warps: int, chip: Chip) -> int:
    """Warps that one multiprocessor holds at once: as registers, memory and slots allow."""
    # registers come in blocks of 256 a warp; each program has 1 KiB of shared memory besides
    of_warp = -(-registers * LANES_OF_WARP // 256) * 256
    blocks = min(
        chip.registers // (of_warp * num_warps),
        chip.shared // (shared + 1024),
        chip.warps // num_warps,
        32,
    )
    return blocks * num_warps
