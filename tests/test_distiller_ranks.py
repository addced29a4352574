"""`Distiller` on several ranks: DDP, accelerate and FSDP2 around it add up to the step of one."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pages import blocks_of
from tiny_runs import run_script

pytest.importorskip("accelerate", reason="a loop of the page is one of accelerate")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks of `ddp_distiller.py` found."""
    folder = tmp_path_factory.mktemp("ranks")
    loops = [block.text for block in blocks_of("docs/guide/loop.md") if "ranks" in block.notes]
    (folder / "blocks.json").write_text(json.dumps(loops))
    done = run_script("ddp_distiller.py", str(folder), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 as a whole", "fsdp2 teacher"])
def test_ranks_add_up_to_the_step(found: dict[str, Any], kind: str) -> None:
    assert found[kind]["gradient"] < 1e-5 and found[kind]["loss"] < 1e-5
    assert found[kind]["compared"] > 20


def test_loops_of_the_page_are_those_of_one_process(found: dict[str, Any]) -> None:
    assert found["page"] == pytest.approx([0, 0, 0], abs=1e-3)
    assert found["saved"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("student", "shard the distiller, not the student"),
        ("layers", "shard the distiller, not the student"),
        ("fsdp1", "shard the distiller, not the student, by FSDP2"),
        ("top", "layer 2 of the student was sharded by itself, but losses read its attention"),
        ("early", "the student is sharded already, .* give it whole to the Distiller"),
    ],
)
def test_what_would_leave_gradients_apart_is_refused(
    found: dict[str, Any], kind: str, said: str
) -> None:
    assert re.search(said, found[kind]), found[kind]
