"""Compile kernels to machine code without a GPU and print what each takes, as JSON lines.

`python -m benchmarks.machine_code [--all]`, in a process without TRITON_INTERPRET. Every kernel is
compiled with the arguments of a recorded launch of a named workload, as the launcher compiles it.
"""

import argparse
import itertools
import json
import multiprocessing
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import issue, sass
from benchmarks.chips import Target
from benchmarks.jobs import Job

# backend and architecture -> threads of a warp
TARGETS: dict[Target, int] = {
    ("cuda", 80): 32,
    ("cuda", 90): 32,
    ("cuda", 100): 32,
    ("hip", "gfx942"): 64,
}
DTYPES = (torch.bfloat16, torch.float32)
# whose bf16 code is read: what sm_100's products are is not in their instructions, and for gfx942
# Triton has no disassembler
DISASSEMBLED: tuple[Target, ...] = (("cuda", 80), ("cuda", 90))
# where the code's least time is predicted, in bf16
PREDICTED_ON: tuple[Target, ...] = (("cuda", 80), ("cuda", 90))
# what the quick run makes in fp32: the tightest of both vendors
QUICK_FLOAT32: tuple[Target, ...] = (("cuda", 80), ("hip", "gfx942"))
# the tensor-core instruction that a product of bf16 blocks should become
EXPECTED = {
    ("cuda", 80): "mma.sync",
    ("cuda", 90): "wgmma.mma_async",
    ("cuda", 100): "tcgen05.mma",
    ("hip", "gfx942"): "v_mfma",
}


def compiled(job: Job, target: Target, *, disassemble: bool = False) -> dict[str, Any]:
    """Registers, bytes of spills and shared memory, products, and tensor-core instructions.

    `products` counts `tt.dot` in Triton's own code and `instructions` the tensor-core
    instructions by kind in the machine's. Disassembled, `code` is what a warp executes
    (`issue.py`), `loads` counts loads of its loops from global memory by width in bytes, and
    `asynchronous` says whether any go to shared memory without registers.
    """
    source, options = as_launched(job, target)
    gpu = GPUTarget(*target, TARGETS[target])
    made = triton.compile(source, target=gpu, options=options)
    row = {
        "shared": made.metadata.shared,
        **resources(made, target[0]),
        "products": len(re.findall(r"\btt\.dot\b", made.asm["ttir"])),
        "instructions": instructions(made.asm["amdgcn" if target[0] == "hip" else "ptx"]),
    }
    if disassemble:
        code = sass.code_of(sass.disassembled(made.asm["cubin"]))
        row["loads"] = {str(width): count for width, count in sorted(sass.loads(code).items())}
        row["asynchronous"] = sass.asynchronous(code.instructions)
        row["code"] = issue.summary(code)
    return row


def narrow_loads(job: Job, row: Mapping[str, Any]) -> list[str]:
    """Tiles that the code of `row` reads in narrower loads than their alignment allows."""
    found = []
    threads = 32 * job.options["num_warps"]
    for width in sorted({width for _, width in job.loads}):
        needed = sum(max(1, size // (threads * wide)) for size, wide in job.loads if wide >= width)
        there = sum(count for size, count in row["loads"].items() if int(size) >= width)
        if there < needed:
            found.append(f"{there} loads of {width} bytes or more where tiles take {needed}")
    return found


def as_launched(job: Job, target: Target) -> tuple[ASTSource, dict[str, Any]]:
    """Source and options that the launcher would compile, by its own steps, for any target.

    Integers that are 1 become constants, multiples of 16 are known as such, and so are pointers;
    a signature made by hand compiles another kernel than the one that runs.
    """
    backend = make_backend(GPUTarget(*target, TARGETS[target]))
    binder = create_function_from_signature(job.kernel.signature, job.kernel.params, backend)
    options = {**job.options, "debug": False}
    bound, specialization, parsed = binder(**job.arguments, **options)
    parsed, signature, constants, attributes = job.kernel._pack_args(
        backend, options, bound, specialization, parsed
    )
    return ASTSource(job.kernel, signature, constants, attributes), parsed.__dict__


def instructions(assembly: str) -> dict[str, int]:
    """Tensor-core instructions of PTX or of AMD's assembly, by kind."""
    found: dict[str, int] = {}
    for kind in EXPECTED.values():
        count = len(re.findall(rf"^\s*(?:@\S+\s+)?{re.escape(kind)}[.\w]", assembly, re.MULTILINE))
        if count:
            found[kind] = count
    return found


def resources(made: Any, backend: str) -> dict[str, int]:
    if backend == "hip":
        text = made.asm["amdgcn"]
        # spilled scalar registers go to lanes of vector registers, not to memory
        spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
        counts = re.findall(r"\.vgpr_count:\s*(\d+)", text)
        return {"registers": int(counts[0]), "spills": sum(map(int, spills))}
    return cubin_resources(made.asm["cubin"])


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes of the kernel, from the ELF sections that ptxas writes.

    EIATTR_REGCOUNT (0x2f) and EIATTR_FRAME_SIZE (0x11) of `.nv.info`; a kernel without arrays of
    its own has a stack only where registers spill.
    """
    found = {"registers": 0, "spills": 0}
    section = elf_section(cubin, ".nv.info")
    offset = 0
    while offset + 4 <= len(section):
        form, attribute = section[offset], section[offset + 1]
        size = int.from_bytes(section[offset + 2 : offset + 4], "little")
        if form == 4:
            value = int.from_bytes(section[offset + 8 : offset + 12], "little")
            if attribute == 0x2F:
                found["registers"] = value
            if attribute == 0x11:
                found["spills"] = value
            offset += 4 + size
        else:
            offset += 4
    return found


def elf_section(data: bytes, wanted: str) -> bytes:
    """One section of a 64-bit little-endian ELF file."""

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], "little")

    table, size, count, names = number(40, 8), number(58, 2), number(60, 2), number(62, 2)
    headers = [table + index * size for index in range(count)]
    strings = number(headers[names] + 24, 8)
    for header in headers:
        start = strings + number(header, 4)
        if data[start : data.index(b"\0", start)].decode() == wanted:
            at = number(header + 24, 8)
            return data[at : at + number(header + 32, 8)]
    raise ValueError(f"the cubin has no section {wanted}")


class Wanted(NamedTuple):
    """One job on one target, for one workload and dtype of an op."""

    op: str
    workload: str
    dtype: torch.dtype
    target: Target
    job: Job

    def key(self) -> tuple[Target, str]:
        """Equal where the machine code is."""
        return self.target, self.job.key()

    def label(self) -> dict[str, Any]:
        kernel = self.job.kernel
        folder = kernel.fn.__module__.split(".")[-2]
        return {
            "op": self.op,
            "workload": self.workload,
            "dtype": str(self.dtype).removeprefix("torch."),
            "target": list(self.target),
            "kernel": self.job.name,
            "function": f"{folder}.{kernel.__name__}",
            "launch": self.job.digest(),
            "source": self.job.source(),
        }


def wanted(ops: Iterable[str], *, everything: bool) -> Iterator[Wanted]:
    """All jobs of the ops' workloads; without `everything`, those that CI compiles.

    All workloads where times are predicted, those of CI elsewhere: fp32, and other targets.
    """
    from benchmarks.launches import OPS, jobs_of

    for (turn, target), dtype, op in itertools.product(enumerate(TARGETS), DTYPES, ops):
        named = {work.name: work for work in OPS[op].WORKLOADS}
        all_of_them = everything and dtype == torch.bfloat16 and target in PREDICTED_ON
        jobs = {
            name: list(jobs_of(op, named[name], dtype, target))
            for name in (named if all_of_them else OPS[op].QUICK)
        }
        if not everything:
            jobs = quick_jobs(jobs, dtype, target, turn)
        for name, of_workload in jobs.items():
            for job in of_workload:
                yield Wanted(op, name, dtype, target, job)


def quick_jobs(
    jobs: Mapping[str, Sequence[Job]], dtype: torch.dtype, target: Target, turn: int
) -> dict[str, list[Job]]:
    """One job of each workload for every kernel, another in every turn.

    In fp32, on the tightest targets alone, one for every kernel whatever the workload.
    """
    if dtype != torch.bfloat16 and target not in QUICK_FLOAT32:
        return {}
    made: dict[str, list[Job]] = {}
    seen: set[str] = set()
    for place, (name, of_workload) in enumerate(jobs.items()):
        by_kernel: dict[str, list[Job]] = {}
        for job in of_workload:
            by_kernel.setdefault(job.kernel.__name__, []).append(job)
        made[name] = [
            same[(turn + place) % len(same)]
            for kernel, same in by_kernel.items()
            if dtype == torch.bfloat16 or kernel not in seen
        ]
        seen |= set(by_kernel)
    return made


def compile_all(
    ops: Iterable[str],
    *,
    everything: bool,
    processes: int,
    known: Mapping[tuple[str, str, str], dict[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for every wanted job, in order; jobs of equal machine code are compiled once.

    `known` has rows by `known_key`: what stands there is not compiled again.
    """
    global _unique
    every = list(wanted(ops, everything=everything))
    found = {one.key(): (known or {}).get(known_key(one.label()), {}) for one in every}
    # bf16 first: what a kernel without half precision shares with fp32 is disassembled too
    first: dict[Any, Wanted] = {}
    for one in every:
        first.setdefault(one.key(), one)
    _unique = [one for key, one in first.items() if not found[key]]
    # forked, because kernels cannot be pickled
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        made = zip(_unique, pool.imap(_compile, range(len(_unique))), strict=True)
        for one in every:
            while not found[one.key()]:
                other, row = next(made)
                found[other.key()] = row
            yield {**one.label(), **found[one.key()]}


def known_key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Equal for rows of one target, launch and source."""
    return str(row["target"]), row["launch"], row["source"]


_unique: list[Wanted] = []


def _compile(index: int) -> dict[str, Any]:
    one = _unique[index]
    disassemble = one.dtype == torch.bfloat16 and one.target in DISASSEMBLED
    return compiled(one.job, one.target, disassemble=disassemble)


def main() -> None:
    from benchmarks.launches import OPS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every workload on every target")
    parser.add_argument("--op", action="append", choices=sorted(OPS), help="only this op")
    parser.add_argument("--processes", type=int, default=2, help="2 unless given")
    given = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    ops = given.op or list(OPS)
    for row in compile_all(ops, everything=given.all, processes=given.processes):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
