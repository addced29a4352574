"""Let one rank end a run, of ranks that have a process group of their own.

Used as `python raising_ranks.py recipe.yaml`, in two ranks: rank 0's functions raise, or a disk of
one of them fails. Every rank prints one line of JSON: of each call what it raised, and the sum that
the ranks make together right after it.
"""

import errno
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastkd

# who waits for a rank that raised alone waits no longer than this
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, said = dist.get_rank(), []
failing: list[str] = []


def fail(event: str, given: tuple[Any, ...]) -> None:
    """Let no file be opened, and no folder made, that is called so."""
    if failing and event in ("open", "os.mkdir") and failing[0] in str(given[0]):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))


def end_step(step: int, _line: dict[str, Any]) -> None:
    """Raise what is no error of fastkd's."""
    if step == 2:
        raise KeyError("pruned")


def end_evaluation(step: int, _found: Any) -> None:
    """Raise one of fastkd's."""
    if step == 4:
        raise fastkd.UserError("bad")


sys.addaudithook(fail)
for name, of, functions in (
    ("/teacher/config.json", 1, {}),
    ("/metrics.jsonl", 0, {}),
    ("/parameters_rank_00001.safetensors", 1, {}),
    ("/step-00000001/.manifest.json", 0, {}),
    ("/step-00000001", 0, {}),
    ("", None, {"on_step": end_step}),
    ("", None, {"on_evaluate": end_evaluation}),
    ("", None, {}),
    # of an evaluation
    ("/run/recipe.yaml", 1, None),
):
    raised = ""
    failing[:] = [name] if of == rank else []
    try:
        if functions is None:
            fastkd.evaluate(Path(sys.argv[1]).parent / "run", quiet=True)
        else:
            # who is not called needs none
            given: dict[str, Any] = functions if rank == 0 else {}
            fastkd.distill(sys.argv[1], resume=True, quiet=True, **given)
    except (KeyError, fastkd.UserError) as error:
        raised = f"{type(error).__name__}: {error}"
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    said.append([raised, total.item()])
print(json.dumps({rank: said}))
dist.destroy_process_group()
