"""Kernels with soft caps at Gemma 2's heads of 256 become machine code that fits the chips.

Those with sinks are among what `test_kernels_compile.py` compiles, and every kind of both stands in
the committed table, which `test_benchmarks_floor.py` checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_apart import compiled_apart, fits
from fastkd_kernels.attention_divergence.triton_path import divergence_launch
from fastkd_kernels.common import launch

ROOT = Path(__file__).parents[1]
# one kind of one sweep and one of two take turns; sm_90 gets the heavier one, and fp32 too; then
# caps and sinks together where registers are fewest
# once by Triton on each target; others are read from the committed table, as in
# `test_kernels_compile.py`
COMPILE = """
import json, torch
from benchmarks import floor
from benchmarks.jobs_attention_divergence import CAPPED, FORMS
from benchmarks.launches import jobs_of
from benchmarks.machine_code import TARGETS, Wanted, compiled, known_key

committed, seen = floor.committed_rows(), set()

def show(job, target):
    wanted = Wanted("attention_divergence", CAPPED.name, torch.bfloat16, target, job)
    row = committed.get(known_key(wanted.label())) if target in seen else None
    seen.add(target)
    print(json.dumps({"target": target, "name": job.name, **(row or compiled(job, target))}))

for turn, target in enumerate(TARGETS):
    for dtype in (torch.bfloat16, torch.float32) if turn == 1 else (torch.bfloat16,):
        for job in jobs_of("attention_divergence", CAPPED, dtype, target):
            if job.kind == ("kl", "js")[turn % 2]:
                show(job, target)
FORMS["both"] = {"capped", "sunk"}
both = CAPPED._replace(name="both", dims=(128, 256))
for job in jobs_of("attention_divergence", both, torch.bfloat16, ("cuda", 90)):
    if job.name == "kl dq":
        show(job, ("cuda", 80))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled_apart(["-c", COMPILE], tmp_path_factory.mktemp("triton"))


def test_capped_kernels_fit_the_chip(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 3 * (len(launch.SHARED_MEMORY) + 1) + 1
    for row in rows:
        assert fits(row), row
        assert row["instructions"], row


def test_caps_and_sinks_change_the_warps_of_wide_heads_alone() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for dims in ((64, 64), (128, 128), (256, 128), (256, 256)):
            for kind in ("kl", "js"):
                for part in ("rows", "dq", "dk"):
                    plain = divergence_launch(part, kind, dims, (dtype, dtype))
                    fewer = plain._replace(num_warps=4) if max(dims) > 128 else plain
                    capped = fewer if part == "rows" else plain
                    sunk = fewer if part == "dq" else plain
                    assert divergence_launch(part, kind, dims, (dtype,) * 2, capped=True) == capped
                    assert divergence_launch(part, kind, dims, (dtype,) * 2, sunk=True) == sunk
