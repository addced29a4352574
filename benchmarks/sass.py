"""What NVIDIA's machine code does: its instructions by kind, its loops, the widths of its loads.

Loops are backward branches, nested by address. What they do not hold runs once: the prologue and
the epilogue of a pipelined loop too. The compiler's waits for memory (a branch back to
instructions that read a barrier and do nothing else) are no loops. What stands behind the last
exit are slow paths of divisions, which are left out.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from triton import knobs

# /*29d0*/  @!P0 BRA 0x70e0 ;
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
TARGET = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)$")
# 64x32x16 of a warp group, 16816 of a warp
GROUP_SHAPE = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)\.")
WARP_SHAPE = re.compile(r"^HMMA\.(16)(8)(\d+)\.")
WIDTH = re.compile(r"\.(?:U|S)?(8|16|32|64|128)\b")
# how the names of what is no wait begin
WORKING = ("LD", "ST", "UTC", "HGMMA", "HMMA", "MUFU", "FADD", "FMUL", "FFMA")


class Instruction(NamedTuple):
    address: int
    text: str
    """Without its predicate."""

    @property
    def name(self) -> str:
        return self.text.split(" ")[0]

    @property
    def kind(self) -> str:
        """The name without its modifiers."""
        return self.name.split(".")[0]


class Work(NamedTuple):
    """What one warp executes: instructions by kind, and operations of its tensor cores.

    `products` are at the rate of bf16: tf32, of half the rate, counts twice.
    """

    kinds: Counter[str]
    products: int


class CodeLoop(NamedTuple):
    """One loop: what its body does beside the loops inside it, and what of that a branch skips."""

    first: int
    last: int
    work: Work
    branched: Work
    inside: tuple["CodeLoop", ...]


class Code(NamedTuple):
    """A kernel: what runs once, and its outer loops in order."""

    once: Work
    loops: tuple[CodeLoop, ...]
    instructions: tuple[Instruction, ...]


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code_of(text: str) -> Code:
    """The loops and instructions of a disassembled kernel."""
    every = list(parsed(text))
    if not any(one.kind == "EXIT" for one in every):
        raise ValueError("the disassembly holds no exit: its form is not the one that is parsed")
    end = max(one.address for one in every if one.kind == "EXIT")
    kept = [one for one in every if one.address <= end]
    spans = loop_spans(kept)
    outer = nested(spans)
    inside = tuple(_loop(span, spans, kept) for span in outer)
    once = [one for one in kept if not any(first <= one.address <= last for first, last in outer)]
    return Code(work_of(once), inside, tuple(kept))


def parsed(text: str) -> Iterator[Instruction]:
    for line in text.splitlines():
        found = LINE.match(line)
        if found:
            yield Instruction(int(found[1], 16), re.sub(r"^@!?U?P\w+\s+", "", found[2]))


def loop_spans(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last address of every loop, sorted; branches back to one place are one loop."""
    ends: dict[int, int] = {}
    for one in instructions:
        target = TARGET.search(one.text)
        if target and int(target[1], 16) < one.address:
            first = int(target[1], 16)
            ends[first] = max(one.address, ends.get(first, 0))
    return sorted(
        span
        for span in ends.items()
        if not _waits([one for one in instructions if span[0] <= one.address <= span[1]])
    )


def _waits(body: Sequence[Instruction]) -> bool:
    """Reads a barrier until it is free, and neither moves nor computes anything."""
    works = any(one.kind.startswith(WORKING) for one in body)
    return not works and any(one.kind in ("SYNCS", "NANOSLEEP") for one in body)


def nested(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The outer ones of sorted spans; an error where two overlap without one holding the other."""
    outer: list[tuple[int, int]] = []
    for first, last in spans:
        if not outer or first > outer[-1][1]:
            outer.append((first, last))
        elif last > outer[-1][1]:
            raise ValueError(f"loops overlap: {outer[-1]} and {(first, last)}")
    return outer


def _loop(
    span: tuple[int, int], spans: Sequence[tuple[int, int]], every: Sequence[Instruction]
) -> CodeLoop:
    first, last = span
    held = [other for other in spans if first <= other[0] and other[1] <= last and other != span]
    outer = nested(held)
    body = [
        one
        for one in every
        if first <= one.address <= last
        and not any(start <= one.address <= end for start, end in outer)
    ]
    skipped = work_of(list(_skipped(body)))
    inside = tuple(_loop(one, held, every) for one in outer)
    return CodeLoop(first, last, work_of(body), skipped, inside)


def _skipped(body: Sequence[Instruction]) -> Iterator[Instruction]:
    """What lies between a branch ahead and its target, both in the body of one loop."""
    end = 0
    for one in body:
        if one.address < end:
            yield one
        target = TARGET.search(one.text)
        if target and one.address < int(target[1], 16) <= body[-1].address:
            end = max(end, int(target[1], 16))


def work_of(instructions: Sequence[Instruction]) -> Work:
    kinds = Counter(one.kind for one in instructions)
    return Work(kinds, sum(products(one.name) for one in instructions))


def products(name: str) -> int:
    """Operations of one warp's tensor-core instruction, two a multiply-add."""
    group, warp = GROUP_SHAPE.match(name), WARP_SHAPE.match(name)
    if group:
        # four warps share it
        flops = 2 * int(group[1]) * int(group[2]) * int(group[3]) // 4
    elif warp:
        flops = 2 * int(warp[1]) * int(warp[2]) * int(warp[3])
    else:
        return 0
    return flops * 2 if ".TF32" in name else flops


def load_width(name: str) -> int:
    """Bytes that one thread reads by an LDG or LDGSTS instruction."""
    width = WIDTH.search(name.replace(".LTC64B", "").replace(".LTC128B", ""))
    return int(width[1]) // 8 if width else 4


def loads(code: Code) -> Counter[int]:
    """Loads from global memory in loops, or in all of a kernel without any, by width in bytes."""
    spans = [(loop.first, loop.last) for loop in code.loops]
    return Counter(
        load_width(one.name)
        for one in code.instructions
        if one.kind in ("LDG", "LDGSTS")
        and (not spans or any(first <= one.address <= last for first, last in spans))
    )


def asynchronous(instructions: Sequence[Instruction]) -> bool:
    """Whether anything is copied from global into shared memory without registers."""
    return any(one.kind in ("LDGSTS", "UTMALDG", "UBLKCP") for one in instructions)
