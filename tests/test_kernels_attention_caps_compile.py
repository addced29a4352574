"""Kernels with soft caps at Gemma 2's heads of 256 become machine code without a spill.

Those with sinks are among what `test_kernels_compile.py` compiles, and every kind of both stands in
the committed table, which `test_benchmarks_floor.py` checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fastkd_kernels import launch
from fastkd_kernels.attention_divergence_launch import TWO_SWEEPS, divergence_launch

ROOT = Path(__file__).parents[1]
# one kind of one sweep and one of two take turns; sm_90 gets the heavier one, and fp32 too
COMPILE = """
import json, torch
from benchmarks.jobs_attention_divergence import CAPPED, jobs
from benchmarks.machine_code import TARGETS, compiled

for turn, target in enumerate(TARGETS):
    for dtype in (torch.bfloat16, torch.float32) if turn == 1 else (torch.bfloat16,):
        for job in jobs(CAPPED, dtype, target[0]):
            if job.name.startswith(("kl", "js")[turn % 2]):
                print(json.dumps({"target": target, "name": job.name, **compiled(job, target)}))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_capped_kernels_fit_the_chip(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 3 * (len(launch.SHARED_MEMORY) + 1)
    for row in rows:
        assert row["registers"] > 0, row
        assert row["spills"] == 0, row
        assert row["shared"] <= launch.SHARED_MEMORY[tuple(row["target"])], row
        assert row["instructions"], row


def test_caps_change_the_warps_of_wide_forwards_alone() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for dims in ((64, 64), (128, 128), (256, 128), (256, 256)):
            for kind in ("kl", *TWO_SWEEPS):
                for part in ("rows", "query", "key"):
                    plain = divergence_launch(part, kind, dims, (dtype, dtype))
                    made = divergence_launch(part, kind, dims, (dtype, dtype), capped=True)
                    fewer = part == "rows" and kind in TWO_SWEEPS and max(dims) > 128
                    assert made == plain._replace(num_warps=4 if fewer else plain.num_warps)
