"""Let rank 0's functions end a run, of ranks that have a process group of their own.

Used as `python raising_callbacks.py recipe.yaml`, in two ranks. Every rank prints one line of JSON:
of each call of `distill` what it raised, and the sum that the ranks make together right after it.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

import fastkd

dist.init_process_group("gloo")
rank, said = dist.get_rank(), []


def end_step(step: int, _line: dict[str, Any]) -> None:
    """Raise what is no error of fastkd's."""
    if step == 2:
        raise KeyError("pruned")


def end_evaluation(step: int, _found: Any) -> None:
    """Raise one of fastkd's."""
    if step == 4:
        raise fastkd.UserError("bad")


for functions in ({"on_step": end_step}, {"on_evaluate": end_evaluation}, {}):
    raised = ""
    try:
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
