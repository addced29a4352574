"""Kernels become machine code without a GPU: within registers and memory, on tensor cores.

With loads as wide as addresses allow, copies that run ahead, and no slower than what is committed.
And the launch functions, which are data. Limits are those of `launch.SHARED_MEMORY`.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from compiled_apart import compiled_apart, fits
from fastkd_kernels.attention_divergence import triton_path as divergence_path
from fastkd_kernels.attention_score_mse.triton_path import causal_chunk, gram_launch, tile_launch
from fastkd_kernels.common import launch
from fastkd_kernels.hidden import triton_path

from benchmarks import floor
from benchmarks.chips import CHIPS
from benchmarks.jobs import Job
from benchmarks.launches import OPS, recorded_calls
from benchmarks.machine_code import known_key, narrow_loads

ROOT = Path(__file__).parents[1]
# the table of benchmarks/machine_code.py once more, so that neither can be bent to fit a kernel
TENSOR_CORES = {
    ("cuda", 80): "mma.sync",
    ("cuda", 90): "wgmma.mma_async",
    ("cuda", 100): "tcgen05.mma",
    ("hip", "gfx942"): "v_mfma",
}


# whose products the vendor's library makes in half precision
IN_FP32_ONLY = {
    "hidden._bwd_dx_kernel",
    "hidden._bwd_dw_kernel",
    "logits_divergence._matmul_kernel",
}
# which take half precision, and more shared memory than AMD's chips have
SHORT = {
    "attention_divergence._short_kernel",
    "attention_score_mse._short_kernel",
    "attention_score_mse._sweep_kernel",
}
# which take half precision, and the products of sm_90
HOPPER = {"hidden._fwd_dx_kernel"}
# which take half precision, and products that land in registers
SWEEPS = {"attention_divergence._rows_dq_kernel", "attention_divergence._dk_value_kernel"}


# one in so many is compiled again, whether or not the committed table has it
ANEW = 25
# what `python -m benchmarks.machine_code` prints, with the rows of `benchmarks.floor` where source,
# launch and Triton are the same
COMPILE = f"""
import json
from benchmarks import floor
from benchmarks.launches import OPS
from benchmarks.machine_code import compile_all

known = {{key: row for key, row in floor.committed_rows().items() if int(key[1], 16) % {ANEW}}}
for row in compile_all(OPS, everything=False, processes=2, known=known):
    print(json.dumps(row), flush=True)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled_apart(["-c", COMPILE], tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """The table of `benchmarks.floor`, if this Triton made it."""
    path = floor.RESULTS / "floor.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["triton"] != triton.__version__:
        pytest.skip(f"the committed code is Triton {found['triton']}'s")
    return found


def test_every_kernel_compiles_for_every_target(rows: list[dict[str, Any]]) -> None:
    """Each kernel of the package, by what its source declares, is among what was compiled."""
    made: dict[tuple[Any, ...], set[str]] = {}
    for row in rows:
        made.setdefault((*row["target"], row["dtype"]), set()).add(row["function"])
    written = kernels_of_the_package()
    assert written
    for target in launch.SHARED_MEMORY:
        absent = IN_FP32_ONLY | (SHORT if target[0] == "hip" else set())
        absent |= HOPPER if target != ("cuda", 90) else set()
        absent |= SWEEPS if target not in (("cuda", 80), ("cuda", 90)) else set()
        assert made[(*target, "bfloat16")] == written - absent
    for target in (("cuda", 80), ("hip", "gfx942")):
        assert made[(*target, "float32")] == written - SHORT - HOPPER - SWEEPS


def test_kernels_fit_the_chip(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert fits(row), row


def test_products_run_on_tensor_cores(rows: list[dict[str, Any]]) -> None:
    """bf16 on each chip's newest instruction; fp32, three tf32 products each, on any."""
    assert any(row["products"] for row in rows)
    for row in rows:
        if not row["products"]:
            continue
        if row["dtype"] == "bfloat16":
            assert TENSOR_CORES[tuple(row["target"])] in row["instructions"], row
        else:
            assert row["instructions"], row


def job_of(row: dict[str, Any]) -> Job:
    """The job that a row was compiled from."""
    (work,) = (work for work in OPS[row["op"]].WORKLOADS if work.name == row["workload"])
    dtype = getattr(torch, row["dtype"])
    calls = recorded_calls(row["op"], work, dtype, tuple(row["target"]))
    (job,) = (job for job in calls.jobs if job.name == row["kernel"])
    assert job.digest() == row["launch"]
    return job


def test_loads_are_as_wide_as_their_alignment(rows: list[dict[str, Any]]) -> None:
    checked = 0
    for row in rows:
        if "loads" in row:
            job = job_of(row)
            assert narrow_loads(job, row) == [], row
            checked += bool(job.loads)
    assert checked > 30


def test_pipelined_products_copy_ahead(rows: list[dict[str, Any]]) -> None:
    """Where there are stages, tiles go to shared memory while the products before them run."""
    staged = [
        row
        for row in rows
        if "asynchronous" in row and row["products"]
        if job_of(row).options["num_stages"] > 1
    ]
    assert staged
    for row in staged:
        assert row["asynchronous"], row


def test_what_is_compiled_again_is_what_is_committed(
    rows: list[dict[str, Any]], committed: dict[str, Any]
) -> None:
    """Equal sources and launches become equal code: a row of the table stands for its launch."""
    before = {known_key(row): row for row in committed["machine_code"]}
    for row in rows:
        other = before.get(known_key(row), {})
        for name in other.keys() - set(floor.LABEL):
            assert row.get(name) == other[name], (row["target"], row["kernel"], name)


def test_code_takes_no_longer_than_what_is_committed(
    rows: list[dict[str, Any]], committed: dict[str, Any]
) -> None:
    """Predicted times on A100 and H100: a share of the floor does not fall unseen."""
    codes = {
        (tuple(row["target"]), row["kernel"], row["dtype"], workload): row
        for row in committed["machine_code"]
        for workload in row["workloads"]
    }
    checked = 0
    for row in rows:
        target = tuple(row["target"])
        before = codes[target, row["kernel"], row["dtype"], row["workload"]]
        for chip in CHIPS if "code" in before else ():
            if chip.target == target:
                job = job_of(row)
                now, then = (floor.of_job(job, one, chip)["microseconds"] for one in (row, before))
                said = f"{row['workload']} {row['kernel']} on {chip.name}: {now} us, was {then}"
                assert now <= 1.02 * then, said
                checked += 1
    assert checked > 40


def kernels_of_the_package() -> set[str]:
    """`op.kernel` of what the launching modules import from the modules of kernels."""
    return {
        f"{path.parent.name}.{alias.name}"
        for path in (ROOT / "kernels/fastkd_kernels").glob("*/triton_path.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and str(node.module).endswith(("_kernel", "_kernels"))
        and not str(node.module).startswith("common")
        for alias in node.names
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [(1, 1), (26, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("tokens", [1, 37, 128, 4096])
@pytest.mark.parametrize("kernel", ["fwd", "dq"])
def test_tile_launch(kernel: str, tokens: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    made = tile_launch(kernel, tokens, dims, (dtype, dtype))
    assert made.constants["BLOCK_DIM"] >= max(16, dims[0])
    assert made.constants["BLOCK_TEACHER_DIM"] >= max(16, dims[1])
    # chunks of causal Grams are whole blocks
    for name in ("BLOCK_KEY", "BLOCK_QUERY"):
        assert causal_chunk(dims) % int(made.constants[name]) == 0
    for name in ("BLOCK_KEY", "BLOCK_QUERY", "BLOCK_DIM", "BLOCK_TEACHER_DIM"):
        size = made.constants[name]
        assert isinstance(size, int)
        assert size >= 16
        assert size & (size - 1) == 0


@pytest.mark.parametrize(
    ("chip", "taken"),
    [
        (80, True),
        (89, True),
        (90, True),
        (120, True),
        (100, False),
        (103, False),
        ("gfx942", False),
    ],
)
def test_chips_whose_products_land_in_registers(
    chip: int | str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "architecture", lambda: chip)
    half = (torch.float16, torch.bfloat16)
    assert divergence_path.takes_two_sweeps("js", (64, 128), half) == taken
    assert divergence_path.takes_two_sweeps("mse", (64, 128), half) == taken
    assert divergence_path.takes_two_sweeps("mse", (128, 64), half) == (chip == 90)
    assert not divergence_path.takes_two_sweeps("kl", (64, 256), half)
    assert not divergence_path.takes_two_sweeps("kl", (64, 64), (torch.float16, torch.float32))


def test_precision_of_products() -> None:
    """What would lose the gradient goes through three tf32 products, or plain fp32 on AMD."""
    single, half = (torch.float32,) * 2, (torch.bfloat16,) * 2
    assert gram_launch((64, 64), single).constants["APPLY_PRECISION"] == "tf32x3"
    assert gram_launch((26, 64), half).constants["APPLY_PRECISION"] == "tf32x3"
    assert gram_launch((64, 64), half).constants["APPLY_PRECISION"] == "tf32"
    assert tile_launch("fwd", 128, (64, 64), single).constants["GRAD_PRECISION"] == "tf32x3"
    assert triton_path.hidden_launch(single).constants["GRAD_PRECISION"] == "tf32x3"
    assert tile_launch("dq", 9, (64, 64), single, "hip").constants["SCORE_PRECISION"] == "ieee"
    assert launch.product_dtype(torch.float16) == torch.float32
    assert launch.product_dtype(torch.bfloat16) == torch.bfloat16


def test_workspace_is_bounded() -> None:
    assert triton_path.hidden_chunk(100, 4, 64) == 100
    rows = triton_path.hidden_chunk(1 << 20, 4 * 4096, 64)
    assert rows % 64 == 0
    assert 0 < rows * 4 * 4096 <= triton_path.WORKSPACE_BYTES
    assert triton_path.hidden_chunk(1 << 20, 1 << 30, 64) == 64


def test_alignment() -> None:
    value = torch.zeros(4, 8, 24)
    assert launch.alignment([value, value.transpose(0, 1), value[..., 8:]]) == 4
    assert launch.alignment([value, value[..., 1:]]) == 1
    # starts and strides alone do not make whole loads: nothing past a row's end may be read
    assert launch.alignment([value[..., :22]]) == 2
    narrow = torch.zeros(2, 4, 12 * 26, dtype=torch.bfloat16)
    assert launch.alignment([narrow]) == 8
    assert launch.alignment([narrow.view(2, 4, 12, 26).transpose(1, 2)]) == 2
    # also behind the only row addresses are made, and masked
    assert launch.alignment([torch.zeros(3, 1, 8).as_strided((3, 1, 8), (8, 5, 1))]) == 1
