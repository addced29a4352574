"""Compile kernels to machine code without a GPU and print what each takes, as JSON lines.

Run as a script in a process of its own, without TRITON_INTERPRET:
`PYTHONPATH=. python tests/kernel_compile.py [--all]`. Every configuration is one that the launch
functions return for a named workload.
"""

import argparse
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
import triton
from fastkd_kernels import attention_score_mse_kernels, gram_kernels, hidden_mse_kernels
from fastkd_kernels.attention_score_mse import choose_algorithm
from fastkd_kernels.attention_score_mse_launch import gram_launch, tile_launch
from fastkd_kernels.attention_score_mse_triton import gram_constants, gram_types, tile_types
from fastkd_kernels.hidden_launch import hidden_launch
from fastkd_kernels.hidden_mse_triton import hidden_types
from fastkd_kernels.tl_types import TYPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.workloads import ATTENTION, HIDDEN, AttentionWorkload, HiddenWorkload

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
DTYPES = (torch.bfloat16, torch.float32)
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
POINTERS = {"table": "*i64", "valid": "*u8"}

Job = tuple[str, Any, dict[str, Any], dict[str, str], int, int]


def attention_jobs(work: AttentionWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    """Kernel, constants, pointer types, warps and stages of one workload."""
    kernels, dtypes = attention_score_mse_kernels, (dtype, dtype)
    shared = {
        "ALIGN": 16 // dtype.itemsize if work.dims[0] * dtype.itemsize % 16 == 0 else 1,
        "TARGET_ALIGN": 16 // dtype.itemsize,
        "HAS_MASK": True,
    }
    chosen = choose_algorithm(work.tokens, *work.dims, causal=work.causal, backend="triton")
    if chosen == "gram":
        launch = gram_launch(work.dims, dtypes, on)
        types = gram_types(*dtypes, work.dims[0] == work.dims[1])
        for side in (0, 1):
            blocks = gram_constants(launch.constants, "BLOCK_PRECISION")
            constants = {**shared, **types, **blocks, "SIDE": side}
            yield ("gram", gram_kernels.gram_matrices, constants, {}, *launch[1:])
            blocks = gram_constants(launch.constants, "APPLY_PRECISION")
            constants = {**shared, **types, **blocks, "SIDE": side}
            pointers = {"gradient": NAMES[dtype]}
            yield ("apply", gram_kernels.apply_factors, constants, pointers, *launch[1:])
        return
    launch = tile_launch(work.tokens, work.dims, dtypes, on)
    constants = {**shared, **tile_types(*dtypes), **launch.constants, "CAUSAL": work.causal}
    whole = work.tokens <= launch.constants["BLOCK_KEY"]
    by_key = {**constants, "WRITE_QUERY": whole, "WRITE_KEY": True}
    yield ("by_key", kernels.tiles_by_key, by_key, {}, *launch[1:])
    if not whole:
        yield ("by_query", kernels.tiles_by_query, constants, {}, *launch[1:])


def hidden_jobs(work: HiddenWorkload, dtype: torch.dtype, on: str) -> Iterator[Job]:
    types, kept = hidden_types(dtype, dtype, dtype)
    operand = types.pop("GRAD_OPERAND")
    launch = hidden_launch((dtype, kept), on)
    blocks = {name: size for name, size in launch.constants.items() if name.startswith("BLOCK_")}
    align = 16 // dtype.itemsize
    aligns = {"ALIGN": align, "TARGET_ALIGN": align, "WEIGHT_ALIGN": align}
    flags = {"HAS_MASK": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "STORE": True}
    kernels, pointers = hidden_mse_kernels, {"residual": NAMES[kept]}
    exact = {**types, **blocks, **aligns, **flags, "BIAS_TYPE": types["TYPE"]}
    exact["PRECISION"] = launch.constants["PRECISION"]
    made = {**exact, "OPERAND": operand, "PRECISION": launch.constants["GRAD_PRECISION"]}
    for kernel, constants in (
        (kernels.residuals, exact),
        (kernels.input_gradient, made),
        (kernels.weight_gradient, made),
    ):
        wanted = {name: constants[name] for name in constants if name in kernel.arg_names}
        yield (kernel.__name__, kernel, wanted, pointers, *launch[1:])


def compiled(job: Job, target: tuple[str, int | str, int]) -> dict[str, Any]:
    """Registers, spills and shared memory of one kernel on one target."""
    _, kernel, constants, pointers, num_warps, num_stages = job
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in {**POINTERS, **pointers}:
            signature[name] = {**POINTERS, **pointers}[name]
        elif name in ARRAYS:
            signature[name] = "*fp32"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget(*target), options=options)
    return {"shared": made.metadata.shared, **resources(made, target[0])}


ARRAYS = {
    "scales",
    "query_grad",
    "key_grad",
    "partials",
    "grams",
    "factors",
    "upstream",
    "gradient",
    "bias_gradient",
    "residual",
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every workload on every target")
    everything = parser.parse_args().all
    seen: set[str] = set()
    for target in TARGETS:
        for dtype in DTYPES:
            works = [
                *((work, attention_jobs(work, dtype, target[0])) for work in ATTENTION.values()),
                *((work, hidden_jobs(work, dtype, target[0])) for work in HIDDEN.values()),
            ]
            for work, jobs in works:
                few = work.name in COMPILED and (
                    dtype == torch.bfloat16 or target[1] in FLOAT32_TARGETS
                )
                if not (everything or few):
                    continue
                for job in jobs:
                    key = repr((target, job[0], job[2], job[4:]))
                    if key in seen:
                        continue
                    seen.add(key)
                    label = {"target": target[:2], "workload": work.name, "kernel": job[0]}
                    label["dtype"] = str(dtype).removeprefix("torch.")
                    print(json.dumps({**label, **compiled(job, target)}), flush=True)


FLOAT32_TARGETS = (80, "gfx942")
# a short, a long and a causal shape: every kernel, both forms of the Gram algebra
COMPILED = {
    "bert-base-to-tinybert-4-128",
    "bert-base-to-tinybert-4-512",
    "minilm-6-to-3-512",
    "llama-like-1024",
    "bert-base-to-tinybert-4",
}

if __name__ == "__main__":
    assert set(NAMES) <= set(TYPES)
    main()
