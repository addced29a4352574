"""The state of training by the names of parameters, the same for every ZeRO stage and rank count.

    parameters  name -> weight in fp32, exp_avg, exp_avg_sq, step; of Muon's weight, momentum; of a
                frozen one its weight alone
    buffers     name -> tensor
    scheduler, counters

It is taken out of one engine and put into another of any layout. Numbers move as bits: what comes
back is what was there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.distributed import Ranks
from fastkd.training.checkpoint.layout import (
    WEIGHT,
    Place,
    find_places,
    follow_masters,
    settled_weights,
)
from fastkd.training.sharded import whole_shape

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")

Parameters = Mapping[str, Mapping[str, Tensor]]
"""By the name of a parameter: its weight, and what the optimiser keeps of it."""


def named_state(engine: Any, ranks: Ranks) -> dict[str, Any]:
    """The state of an engine; collective.

    Returns:
        With this rank's share of the parameters, on the CPU where they had to be gathered; the
        shares of all ranks are about equally large.
    """
    names = dict(engine.module.named_parameters())
    parameters = {}
    with settled_weights(engine):
        of_ranks = [find_places(engine, rank) for rank in range(ranks.world_size)]
        held = {name: [places[p] for places in of_ranks] for name, p in names.items()}
        sizes = {name: whole_shape(parameter).numel() for name, parameter in names.items()}
        owners = find_owners(sizes, held)
        for name, parameter in names.items():
            owner, place = owners[name], held[name][ranks.rank]
            if held[name][owner].holds(sizes[name]):
                found = {key: place.piece(tensor) for key, tensor in place.tensors.items()}
            else:
                found = _gathered(place, sizes[name], owner, ranks)
            if owner == ranks.rank:
                shape = whole_shape(parameter)
                parameters[name] = {k: v.view(shape) if v.ndim else v for k, v in found.items()}
    return {
        "parameters": parameters,
        "buffers": dict(_buffers(engine.module)),
        "scheduler": engine.lr_scheduler.state_dict(),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
    }


def load_named_state(engine: Any, state: Mapping[str, Any], ranks: Ranks) -> None:
    """Put a state into an engine that has made no step; collective.

    Args:
        engine: of any stage, on any number of ranks.
        state: with the parameters of all ranks; each tensor is read when it is asked for.
        ranks: this process among all.

    Raises:
        ValueError: the state is of another model, or can't be that of this stage.
    """
    names = dict(engine.module.named_parameters())
    stored: Parameters = state["parameters"]
    # all ranks find the same, so that none of them waits for one that has gone
    _check_same(names, stored)
    with settled_weights(engine), torch.no_grad():
        places = find_places(engine, ranks.rank)
        make_states({name: places[p] for name, p in names.items()}, stored)
        for name, parameter in names.items():
            _put(places[parameter], stored[name])
        follow_masters(engine)
    for name, buffer in _buffers(engine.module):
        buffer.copy_(state["buffers"][name])
    engine.lr_scheduler.load_state_dict(state["scheduler"])
    rates = engine.lr_scheduler.get_last_lr()
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for name in _COUNTERS:
        setattr(engine, name, state["counters"][name])


def _gathered(place: Place, size: int, owner: int, ranks: Ranks) -> dict[str, Tensor]:
    """All of a parameter of which every rank may have a piece, flat on its owner; nothing of use
    elsewhere."""
    found = {}
    for key, tensor in place.tensors.items():
        if not tensor.ndim:
            found[key] = tensor
            continue
        whole = torch.zeros(size, dtype=tensor.dtype, device=ranks.device)
        place.cut(whole).copy_(place.piece(tensor))
        # as whole numbers: a sum of the others would make a negative zero positive
        ranks.sum_to(owner, whole.view(torch.int32 if whole.itemsize == 4 else torch.uint8))
        found[key] = whole.cpu() if owner == ranks.rank else whole
    return found


def make_states(places: Mapping[str, Place], stored: Parameters) -> None:
    """Let the optimiser have a state where its first step would make one, with the number of steps.

    Raises:
        ValueError: parameters that share a flat tensor made different numbers of steps.
    """
    steps: dict[Tensor, dict[float, str]] = {}
    for name, place in places.items():
        if place.optimizer is None or stored[name].keys() == {WEIGHT}:
            continue
        state = place.optimizer.state[place.master]
        for key, value in stored[name].items():
            if not value.ndim:
                # where the fused AdamW keeps it
                state[key] = value.to(place.master.device, copy=True)
                steps.setdefault(place.master, {})[value.item()] = name
            elif key != WEIGHT and key not in state:
                state[key] = torch.zeros_like(place.master)
    for found in steps.values():
        if len(found) > 1:
            said = ", ".join(f"{name} {step:g}" for step, name in sorted(found.items()))
            raise ValueError(
                f"parameters of one group made different numbers of steps ({said}), which one "
                "flat tensor can't keep apart; continue at the stage and with the ranks of before"
            )


def _put(place: Place, stored: Mapping[str, Tensor]) -> None:
    there = place.tensors
    if place.offset is None or place.length:
        for key, value in stored.items():
            if value.ndim:
                place.piece(there[key]).copy_(place.cut(value))


def _check_same(names: Mapping[str, nn.Parameter], stored: Parameters) -> None:
    for name in sorted(names.keys() ^ stored.keys()):
        where = "has no parameter" if name in names else "has a parameter more:"
        raise ValueError(f"it {where} {name}")
    for name, parameter in names.items():
        shape = whole_shape(parameter)
        for key, value in stored[name].items():
            if value.ndim and value.shape != shape:
                raise ValueError(f"{key} of {name} is {list(value.shape)}, expected {list(shape)}")


def find_owners(sizes: Mapping[str, int], held: Mapping[str, Sequence[Place]]) -> dict[str, int]:
    """Which rank writes which parameter: one that has all of it, where one alone does; of the rest
    the largest first, to the rank that has least.

    Args:
        sizes: of the parameters.
        held: their places on each rank.
    """
    loads = [0] * len(next(iter(held.values())))
    owners = {}
    every = list(range(len(loads)))
    free = {
        name: [rank for rank in every if places[rank].holds(sizes[name])] or every
        for name, places in held.items()
    }
    # those without a choice first
    for name in sorted(sizes, key=lambda name: (len(free[name]), -sizes[name], name)):
        owners[name] = min(free[name], key=lambda rank: loads[rank])
        loads[owners[name]] += sizes[name]
    return owners


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = module.state_dict().keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)
