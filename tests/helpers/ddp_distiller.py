"""A step of a `Distiller` under DDP, each rank with its share of a batch, against one process.

Used under torchrun as `python ddp_distiller.py`; rank 0 prints the largest difference of a gradient
and of the loss as JSON.
"""

from __future__ import annotations

import json

import torch.distributed as dist
from tiny_models import tiny_batch, tiny_model
from torch.nn.parallel import DistributedDataParallel

import fastkd

LOSSES = {"attention": {}, "hidden": {"weight": 2}, "balance": "uncertainty"}


def distiller() -> fastkd.Distiller:
    """Of the same weights on every rank."""
    student = tiny_model("bert", 1, num_hidden_layers=2, hidden_size=24)
    return fastkd.Distiller(student, tiny_model("bert", 0).requires_grad_(False), LOSSES)


def main() -> None:
    """Compare."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = tiny_batch((12, 7, 3, 9))
    mine = {name: value[rank::world] for name, value in whole.items()}
    alone, shared = distiller(), distiller()
    with alone:
        expected, _ = alone(whole)
        expected.backward()
    wrapped = DistributedDataParallel(shared, find_unused_parameters=True)
    with shared:
        counts = shared.count(mine)
        dist.all_reduce(counts)
        loss, _ = wrapped(mine, counts=counts, pieces=world)
        loss.backward()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    pairs = zip(alone.parameters(), shared.parameters(), strict=True)
    differences = [(a.grad - b.grad).abs().max().item() for a, b in pairs if a.grad is not None]
    found = {"gradient": max(differences), "loss": (mean - expected).abs().item()}
    if rank == 0:
        print(json.dumps({**found, "compared": len(differences)}))
    # a group that one leaves while another still receives, or that DDP still holds, may abort
    dist.barrier()
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
