"""`Distiller`s on several ranks, each with its share of a batch, against one process.

Used under torchrun as `python ddp_distiller.py FOLDER`, where `blocks.json` holds the loops of a
page; rank 0 prints what became of them as JSON:
the largest differences of gradients and weights, and what was said where a model was refused.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import tiny_batch, tiny_model
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel

import fastkd

LOSSES: dict[str, Any] = {"attention": {}, "hidden": {"weight": 2}}
BATCHES = [tiny_batch((12, 7, 3, 9)), tiny_batch((12, 4, 8, 2), seed=1)]


def distiller(losses: dict[str, Any] = LOSSES, **changes: Any) -> fastkd.Distiller:
    """Of the same weights on every rank."""
    student = tiny_model("bert", 1, **{"num_hidden_layers": 2, "hidden_size": 24, **changes})
    return fastkd.Distiller(student, tiny_model("bert", 0).requires_grad_(False), losses)


def mine(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[dist.get_rank() :: dist.get_world_size()] for name, value in whole.items()}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(called: Any, own: fastkd.Distiller, whole: dict[str, Tensor]) -> Tensor:
    """Gradients of a rank's share of a batch; the loss of all."""
    with own:
        counts = own.count(mine(whole))
        dist.all_reduce(counts)
        loss, _ = called(mine(whole), counts=counts, pieces=dist.get_world_size())
        loss.backward()
    mean: Tensor = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean


def compared(
    losses: dict[str, Any], wrap: Callable[[fastkd.Distiller], Any], **changes: Any
) -> dict[str, float]:
    """A step of ranks against that of one process."""
    alone, shared = distiller(losses, **changes), distiller(losses, **changes)
    with alone:
        expected, _ = alone(BATCHES[0])
        expected.backward()
    loss = step(wrap(shared), shared, BATCHES[0])
    pairs = zip(alone.parameters(), shared.parameters(), strict=True)
    differences = [
        (a.grad - full(b.grad)).abs().max().item() for a, b in pairs if a.grad is not None
    ]
    return {
        "gradient": max(differences),
        "loss": (loss - expected).abs().item(),
        "compared": len(differences),
    }


def page_loop(number: int, steps: list[dict[str, Tensor]]) -> float:
    """The loop of a block of the page, and how far its weights are from those of whole batches."""
    block = json.loads(Path("blocks.json").read_text())[number]
    # an optimiser whose steps are in proportion to gradients
    text = block.replace("AdamW", "SGD").replace("dist.init_process_group()", "pass")
    alone, shared = distiller(), distiller()
    names = {
        **{"torch": torch, "dist": dist, "distiller": shared, "student": shared.student},
        "batches": [mine(batch) for batch in BATCHES],
        "optimizer": torch.optim.SGD(shared.parameters(), lr=3e-4),
    }
    exec(compile(text, f"block {number}", "exec"), names)
    optimizer = torch.optim.SGD(alone.parameters(), lr=3e-4)
    before = [p.detach().clone() for p in alone.parameters()]
    with alone:
        for batch in steps:
            alone(batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(before, alone.parameters(), shared.parameters(), strict=True)
    moved = [((a - old).abs().max(), (a - full(b)).abs().max()) for old, a, b in pairs]
    return (max(apart for _, apart in moved) / max(by for by, _ in moved)).item()


def refused(losses: dict[str, Any], shard: Callable[[fastkd.Distiller], Any]) -> str:
    """What is said of a distiller that was sharded."""
    try:
        own = distiller(losses)
        step(shard(own) or own, own, BATCHES[0])
    except fastkd.UserError as error:
        return str(error)
    return "nothing"


def by_layers(own: fastkd.Distiller, *, outer: bool = True) -> None:
    for layer in own.student.encoder.layer:
        fully_shard(layer)
    if outer:
        fully_shard(own)


def before_it_is_made() -> str:
    student = tiny_model("bert", 1, num_hidden_layers=2)
    fully_shard(student)
    try:
        fastkd.Distiller(student, tiny_model("bert", 0).requires_grad_(False), LOSSES)
    except fastkd.UserError as error:
        return str(error)
    return "nothing"


def sharded_teacher(own: fastkd.Distiller) -> Any:
    for layer in own.teacher.encoder.layer:
        fully_shard(layer)
    fully_shard(own.teacher)
    return DistributedDataParallel(own, find_unused_parameters=True)


def main() -> None:
    """Compare."""
    os.chdir(sys.argv[1])
    # as `accelerate launch --cpu` does
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo")

    def ddp(own: fastkd.Distiller) -> Any:
        return DistributedDataParallel(own, find_unused_parameters=True)

    learned = {**LOSSES, "balance": "uncertainty"}
    attention = {"attention": {}}
    found: dict[str, Any] = {
        "ddp": compared(learned, ddp),
        "fsdp2": compared(learned, lambda own: by_layers(own) or own),
        "fsdp2 as a whole": compared(attention, fully_shard),
        "fsdp2 teacher": compared(LOSSES, sharded_teacher),
        "page": [page_loop(0, BATCHES), page_loop(2, BATCHES)],
        "student": refused(LOSSES, lambda own: fully_shard(own.student) and None),
        "layers": refused(LOSSES, lambda own: by_layers(own, outer=False)),
        "fsdp1": refused(
            LOSSES, lambda own: FullyShardedDataParallel(own, device_id=torch.device("cpu"))
        ),
        "top": refused(attention, by_layers),
        "early": before_it_is_made(),
    }
    weights, saved = AutoModel.from_pretrained("student").state_dict(), distiller().student
    found["saved"] = weights.keys() == saved.state_dict().keys()
    both = {name: torch.cat([batch[name] for batch in BATCHES]) for name in BATCHES[0]}
    found["page"].append(page_loop(1, [both]))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    # a group that one leaves while another still receives, or that DDP still holds, may abort
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
