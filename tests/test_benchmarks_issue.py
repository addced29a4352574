"""What machine code takes to be issued: its loops, counted as often as launches turn them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from compiled_apart import compiled_apart

from benchmarks import issue, sass
from benchmarks.chips import Chip
from benchmarks.jobs import Job, Loop, Run, source_digest, specialised
from benchmarks.launches import OPS, recorded_calls
from benchmarks.machine_code import narrow_loads
from benchmarks.recording import Launch, meta, recorded, tensor_bytes
from benchmarks.workloads import AttentionWorkload

# two loops, of which the second holds one; a wait; a slow path behind the exit
TEXT = """
    Function : _fwd_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
                                                                   /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x0040 ;                    /* 0x0000000000000000 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P0 BRA 0x0020 ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/              @!P2 LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R4 ;
        /*0080*/              @!P0 BRA 0x0070 ;
        /*0090*/               @P3 BRA 0x0060 ;
        /*00a0*/              @!UP1 BRA 0x0050 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0x00c0;
        /*00d0*/                   MUFU.RCP R3, R3 ;
"""


def test_loops_are_backward_branches() -> None:
    code = sass.code_of(TEXT)
    assert code.once.kinds == Counter(LDC=1, BRA=1, MUFU=1, EXIT=1)
    first, second = code.loops
    assert first.work.kinds == Counter(LDG=1, BRA=1)
    assert first.inside == ()
    assert second.work.kinds == Counter(LDGSTS=1, BRA=1)
    (inner,) = second.inside
    # the wait is no loop of the kernel's
    assert inner.work.kinds == Counter(HGMMA=1, SYNCS=1, BRA=2)
    assert inner.work.products == 2 * 64 * 32 * 16 // 4
    assert inner.inside == ()
    with pytest.raises(ValueError, match="loops overlap"):
        sass.nested([(0, 20), (10, 30)])
    with pytest.raises(ValueError, match="holds no exit"):
        sass.code_of("nothing of the kind")


def test_instructions() -> None:
    assert sass.products("HMMA.16816.F32.BF16") == 2 * 16 * 8 * 16
    # half as fast
    assert sass.products("HMMA.1688.F32.TF32") == 2 * 2 * 16 * 8 * 8
    assert sass.products("HGMMA.64x128x8.F32.TF32") == 2 * 2 * 64 * 128 * 8 // 4
    assert sass.products("HFMA2.BF16_V2") == 0
    widths = {"LDG.E": 4, "LDG.E.U8": 1, "LDG.E.U16": 2, "LDG.E.64": 8, "LDGSTS.E.BYPASS.128": 16}
    assert {name: sass.load_width(name) for name in widths} == widths
    assert sass.load_width("LDGSTS.E.BYPASS.LTC128B.128") == 16
    code = sass.code_of(TEXT)
    assert sass.loads(code) == {16: 2}
    assert sass.asynchronous(code.instructions)


def counts(slots: int, memory: int = 0, loops: Any = (), **other: int) -> dict[str, Any]:
    plain = dict.fromkeys(("special", "integer", "flops"), 0)
    branched = {**plain, "slots": 0, "memory": 0}
    made = {**plain, "slots": slots, "memory": memory, **other}
    return {**made, "branched": branched, "loops": list(loops)}


def test_loops_count_as_often_as_they_turn() -> None:
    code = counts(10, special=1, loops=[counts(3), counts(5, loops=[counts(7, flops=2)])])
    turned = issue.executed(code, (Loop(2), Loop(4, (Loop(2.5),))))
    assert turned["slots"] == 10 + 2 * 3 + 4 * 5 + 4 * 2.5 * 7
    assert turned["flops"] == 4 * 2.5 * 2
    assert turned["special"] == 1
    # of 5 slots of a turn, 4 behind a branch that every fourth turn takes
    behind = {**counts(5), "branched": counts(4)}
    assert issue.executed(counts(1, loops=[behind]), (Loop(8, branched=0.25),))["slots"] == 17
    for loops in ((), (Loop(2),), (Loop(2), Loop(4))):
        with pytest.raises(ValueError, match="loops in a row where the kernel has"):
            issue.executed(code, loops)


def test_unrolled_loops_are_one_of_the_kernel() -> None:
    """Four turns at once, as loads and stores say, then those that are left."""
    code = counts(1, loops=[counts(70, 16), counts(20, 4)])
    assert issue.executed(code, (Loop(11),))["slots"] == 1 + 2 * 70 + 3 * 20
    # no whole number of turns
    with pytest.raises(ValueError, match="2 loops in a row where the kernel has 1"):
        issue.executed(counts(1, loops=[counts(70, 15), counts(20, 4)]), (Loop(11),))


def test_prediction_is_what_is_scarcest() -> None:
    lanes = {"special": 16, "integer": 64, "memory": 32}
    rates = {"bandwidth": 100.0, "rate": 200.0, "source": "none"}
    # one cycle a second
    chip = Chip("toy", ("cuda", 90), **rates, multiprocessors=2, flops_of_cycle=100, lanes=lanes)
    row = {"code": counts(40, 2, special=3, integer=10, flops=50)}
    # of five programs one multiprocessor gets three
    made = issue.predicted(row, Run(5, (), 1000, even=True), 4, chip)
    assert made == (3 * 4 * 40 / 4, 3 * 4 * 3 * 2, 3 * 4 * 10 / 2, 3 * 4 * 2, 3 * 4 * 0.5, 10.0)
    assert (made.limit, made.seconds) == ("slots", 120.0)
    uneven = issue.predicted(row, Run(5, (), 100_000, even=False), 4, chip)
    assert uneven.slots == 2.5 * 40
    assert (uneven.limit, uneven.seconds) == ("bytes", 1000.0)


def test_resident_warps() -> None:
    chip = Chip("toy", ("cuda", 90), 1.0, 1.0, "none", shared=228 << 10)
    # registers: 168 a thread are 5376 a warp, 21504 a program; then memory; then warps
    assert issue.resident_warps(161, 0, 4, chip) == 12
    assert issue.resident_warps(32, 100 << 10, 4, chip) == 8
    assert issue.resident_warps(32, 0, 8, chip) == 64


def test_narrow_loads_show() -> None:
    """Of 4 KiB a step, 128 threads take two loads of 16 bytes, and four of 4 of 2 KiB."""
    job = Job("tiles", None, {}, {"num_warps": 4}, ((4096, 16), (2048, 4)))
    assert narrow_loads(job, {"loads": {"1": 9, "4": 4, "16": 2}}) == []
    (found,) = narrow_loads(job, {"loads": {"1": 9, "2": 8, "16": 2}})
    assert found == "2 loads of 4 bytes or more where tiles take 6"
    (found,) = narrow_loads(job, {"loads": {"4": 12}})
    assert found == "0 loads of 16 bytes or more where tiles take 2"


def test_arguments_that_the_launcher_compiles_for() -> None:
    made = {value: specialised(value) for value in (0, 1, 26, 64, 2**31, 2**31 + 1)}
    assert made == {
        **{0: "i32 of 16", 1: "1", 26: "i32", 64: "i32 of 16"},
        **{2**31: "i64 of 16", 2**31 + 1: "i64"},
    }
    assert specialised(meta(3, dtype=torch.bfloat16)) == "torch.bfloat16"


def test_launches_are_recorded_on_tensors_without_memory() -> None:
    work = AttentionWorkload("small", 2, 2, 3, (3, 3), 200, (26, 64))
    calls = recorded_calls("attention_divergence", work, torch.bfloat16, ("cuda", 100))
    assert calls.pairs == 4
    rows, query, key = (job for job in calls.jobs if job.kind == "reverse_kl")
    assert [job.name for job in (rows, query, key)] == [
        f"reverse_kl {name}" for name in ("rows", "dq", "dk")
    ]
    blocks = -(-200 // rows.arguments["BLOCK_QUERY"])
    (run,) = rows.runs
    assert run.programs == 4 * 2 * 3 * blocks
    assert run.loops == (Loop(-(-200 // rows.arguments["BLOCK_KEY"])),) * 2
    # both sides' queries and keys, the statistics, and little else
    read = 4 * 2 * 3 * 200 * 2 * (26 + 64) * 2
    stats = 4 * 5 * 2 * 3 * 200 * 4
    assert read + stats < run.bytes < 1.05 * (read + stats)


def test_arguments_that_stand_in_are_counted_once() -> None:
    value = meta(5, dtype=torch.float32)
    launch = Launch(None, {"a": value, "b": value, "c": meta(3, dtype=torch.int64)}, 1, {})
    assert tensor_bytes(launch) == 5 * 4 + 3 * 8


def test_products_of_the_library_are_recorded() -> None:
    from fastkd_kernels.common import library_products

    with recorded(("cuda", 90)) as made:
        left, right = meta(4, 3, dtype=torch.bfloat16), meta(3, 5, dtype=torch.bfloat16)
        assert library_products.takes(left.device, left.dtype, right.dtype)
        library_products.multiply(left, right, meta(4, 5, dtype=torch.float32), add=True)
    assert made == [(4, 3, 5, 2 * 12 + 2 * 15 + 2 * 4 * 20)]
    assert made[0].flops == 2 * 60
    assert not library_products.takes(left.device, left.dtype, right.dtype)


def test_digest_of_source_is_of_all_that_a_kernel_calls() -> None:
    """And not of its comments."""
    from fastkd_kernels.attention_divergence import tile_jit, triton_kernels
    from fastkd_kernels.common import soft_cap_jit

    kernel = triton_kernels._rows_kernel
    before = source_digest(kernel)
    reached, other = soft_cap_jit.soft_cap, soft_cap_jit.cap_slope
    globals_of = vars(tile_jit)
    try:
        source_digest.cache_clear()
        globals_of["soft_cap"] = other
        assert source_digest(kernel) != before
    finally:
        globals_of["soft_cap"] = reached
        source_digest.cache_clear()
    assert source_digest(kernel) == before


def test_every_launch_has_loops_that_its_module_knows() -> None:
    """On the workloads that CI compiles, in both dtypes."""
    for op, module in OPS.items():
        for work in module.WORKLOADS:
            for dtype in (torch.bfloat16, torch.float32) if work.name in module.QUICK else ():
                for job in recorded_calls(op, work, dtype, ("cuda", 90)).jobs:
                    # a Triton with another default would make other code
                    assert job.options["enable_fp_fusion"], job.name
                    assert job.runs, job.name
                    for run in job.runs:
                        assert run.programs > 0, job.name
                        assert run.bytes > 0, job.name


# the launcher itself, stopped before it compiles, for a GPU that is not there
LAUNCHED = """
import json, torch
from unittest.mock import patch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit
from benchmarks.launches import OPS, recorded_calls
from benchmarks.machine_code import as_launched

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

def stopped(self, key, signature, device, constants, options, attributes, warmup):
    made.append((ASTSource(self, signature, constants, attributes).hash(), options.hash()))

with patch.object(jit.JITFunction, "_do_compile", stopped), patch.object(jit, "driver") as driver:
    driver.active = Driver()
    for op, module in OPS.items():
        for work in module.WORKLOADS:
            if work.name not in module.QUICK:
                continue
            for job in recorded_calls(op, work, torch.bfloat16, ("cuda", 90)).jobs:
                made = []
                job.kernel.run(grid=(1,), warmup=True, **job.arguments, **job.options)
                source, options = as_launched(job, ("cuda", 90))
                parsed = make_backend(GPUTarget("cuda", 90, 32)).parse_options(options)
                ours = (source.hash(), parsed.hash())
                print(json.dumps({"job": f"{op} {work.name} {job.name}", "same": made == [ours]}))
"""


def test_compiled_is_what_is_launched(tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = compiled_apart(["-c", LAUNCHED], tmp_path_factory.mktemp("triton"))
    assert len(rows) > 40
    assert [row["job"] for row in rows if not row["same"]] == []
