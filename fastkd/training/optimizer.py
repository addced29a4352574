"""The optimiser of what trains: its groups of parameters, and the matrices that Muon updates."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.blocks import find_blocks
from fastkd.distributed import Ranks
from fastkd.losses.objective import DistilledStudent, Objective
from fastkd.recipe import Train
from fastkd.training.checkpoint.layout import find_places
from fastkd.training.muon import Muon, Piece, block_matrices, is_bias


def make_optimizer(module: DistilledStudent, train: Train) -> torch.optim.AdamW:
    """Fused AdamW, or `Muon` with it, over all of a module that trains."""
    groups = parameter_groups(module, train)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)
    matrices = block_matrices(find_blocks(module.student))
    return Muon(_with_matrices(groups, matrices), lr=train.learning_rate, betas=train.betas)


def matrix_numbers(student: PreTrainedModel, train: Train) -> int:
    """Numbers of a student that Muon updates."""
    if train.optimizer == "adamw":
        return 0
    return sum(matrix.numel() for matrix in block_matrices(find_blocks(student)))


def _with_matrices(
    groups: list[dict[str, Any]], matrices: set[nn.Parameter]
) -> list[dict[str, Any]]:
    """Groups of which the matrices stand apart."""
    apart = []
    for group in groups:
        for muon in (True, False):
            same = [p for p in group["params"] if (p in matrices) == muon]
            if same:
                apart.append({**group, "params": same, "muon": muon})
    return apart


def parameter_groups(module: nn.Module, train: Train) -> list[dict[str, Any]]:
    """Matrices with weight decay, biases and normalisation weights without; what has a learning
    rate of its own, such as a projection, in groups apart."""
    rates = {
        ".".join(filter(None, (prefix, name))): rate
        for prefix, part in module.named_modules()
        if isinstance(part, Objective)
        for name, rate in part.parameter_rates().items()
    }
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups = []
    for rate in (None, *sorted(set(rates.values()))):
        same = {name: p for name, p in trained.items() if rates.get(name) == rate}
        own = {} if rate is None else {"lr": rate}
        pulled = [p for name, p in same.items() if p.ndim > 1 and not is_bias(name)]
        free = [p for name, p in same.items() if p.ndim <= 1 or is_bias(name)]
        groups += [
            {"params": pulled, "weight_decay": train.weight_decay, **own},
            {"params": free, "weight_decay": 0.0, **own},
        ]
    return [group for group in groups if group["params"]]


def flat_pieces(engine: Any, ranks: Ranks) -> dict[Tensor, list[Piece]]:
    """Where the matrices of the optimiser lie in the flat tensors of ZeRO 1 and 2."""
    of_ranks = [find_places(engine, rank) for rank in range(ranks.world_size)]
    pieces: dict[Tensor, list[Piece]] = defaultdict(list)
    for parameter, place in of_ranks[ranks.rank].items():
        if place.offset is not None:
            size = parameter.numel()
            shared = not any(places[parameter].holds(size) for places in of_ranks)
            piece = Piece(parameter.shape, place.start, place.length, place.offset, shared)
            pieces[place.master].append(piece)
    return pieces
