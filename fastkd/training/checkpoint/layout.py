"""Where an engine keeps a parameter's master weight and what the optimiser remembers of it.

DeepSpeed keeps them in flat tensors, of which each rank has a piece: how they are laid out follows
the ZeRO stage, the precision, the number of ranks and the offloading.

    one process          the parameter itself, or a group's parameters one after the other
    stage 0              the parameter itself, whole on every rank
    stages 1 and 2       a group's parameters one after the other, cut into equal pieces
    stage 3              every parameter cut into equal pieces, those of a rank one after the other

The last pieces are padded.

The road not taken is `deepspeed.utils.safe_get_full_fp32_param` and its neighbours: they know
nothing at stage 0, no moments before the first step, no padding at stage 3 where they write, and
another place than the true one where gradients go to ranks in turn (`round_robin_gradients`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.training.local_engine import LocalEngine
from fastkd.training.sharded import whole_shape

WEIGHT = "weight"


@dataclass(frozen=True)
class Place:
    """Where this rank keeps elements `start` to `start + length` of a parameter."""

    master: Tensor
    """One parameter in its shape, or many in a flat tensor; the key of the optimiser's state."""
    optimizer: torch.optim.Optimizer | None
    """`None` of a frozen parameter."""
    start: int = 0
    length: int = 0
    """0 where other ranks keep all of it."""
    offset: int | None = None
    """Place of the first of these elements in `master`; `None` where that is the parameter, whole
    on every rank."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The master weight, and what the optimiser keeps beside it: laid out alike, or scalars."""
        state = {} if self.optimizer is None else self.optimizer.state.get(self.master, {})
        return {WEIGHT: self.master.detach(), **state}

    def holds(self, size: int) -> bool:
        """Whether all of the parameter, which has this size, is on this rank."""
        return self.offset is None or self.length == size

    def piece(self, tensor: Tensor) -> Tensor:
        """This rank's elements of the parameter in a tensor that is laid out as `master`; a scalar
        as it is."""
        if self.offset is None or not tensor.ndim:
            return tensor
        return tensor.narrow(0, self.offset, self.length)

    def cut(self, value: Tensor) -> Tensor:
        """These elements of a value of the whole parameter."""
        if self.offset is None:
            return value
        return value.reshape(-1).narrow(0, self.start, self.length)


def find_places(engine: Any, rank: int) -> dict[nn.Parameter, Place]:
    """The place of every parameter of an engine.

    Args:
        engine: inside `settled_weights`.
        rank: this one.
    """
    optimizer = engine.optimizer
    trained: Iterable[tuple[nn.Parameter, Place]]
    if isinstance(engine, LocalEngine):
        trained = _of_one_process(engine)
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        trained = _stage_3(optimizer, rank)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        trained = _flat_groups(
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.optimizer,
            rank,
        )
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        # stage 1 in bf16
        groups = optimizer.bf16_groups
        offsets = [_offsets(group) for group in groups]
        flats = optimizer.fp32_groups_flat_partition
        trained = _flat_groups(flats, groups, offsets, optimizer.optimizer, rank)
    else:
        assert isinstance(optimizer, torch.optim.Optimizer), type(optimizer)
        trained = ((p, Place(p, optimizer)) for g in optimizer.param_groups for p in g["params"])
    places = dict(trained)
    frozen = (p for p in engine.module.parameters() if p not in places)
    return {**places, **{p: _frozen(p, rank) for p in frozen}}


@contextmanager
def settled_weights(engine: Any) -> Iterator[None]:
    """Let ZeRO-3 have nothing but its pieces while the context is open, and gather after it what
    stays whole between steps."""
    sharded = hasattr(engine.optimizer, "fp32_partitioned_groups_flat")
    if sharded:
        engine.optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        if sharded:
            engine.optimizer.checkpoint_event_epilogue()


def follow_masters(engine: Any) -> None:
    """Make the weights that the model computes with those of the masters; collective, inside
    `settled_weights`."""
    optimizer = engine.optimizer
    if isinstance(engine, LocalEngine):
        if engine.flat is not None:
            engine.flat.follow()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def _of_one_process(engine: LocalEngine) -> Iterator[tuple[nn.Parameter, Place]]:
    if engine.flat is None:
        yield from ((p, Place(p, engine.optimizer)) for p in engine.trained)
        return
    for parameter, (updated, offset) in engine.flat.places.items():
        length = 0 if offset is None else parameter.numel()
        yield parameter, Place(updated, engine.optimizer, 0, length, offset)


def _flat_groups(
    flats: list[Tensor],
    groups: list[list[nn.Parameter]],
    offsets: list[list[int]],
    optimizer: torch.optim.Optimizer,
    rank: int,
) -> Iterator[tuple[nn.Parameter, Place]]:
    for flat, group, begins in zip(flats, groups, offsets, strict=True):
        first, last = rank * flat.numel(), (rank + 1) * flat.numel()
        for parameter, begin in zip(group, begins, strict=True):
            end = begin + parameter.numel()
            # both are one end of the parameter where nothing of it is here
            start, stop = (min(max(edge, begin), end) for edge in (first, last))
            offset = min(max(start - first, 0), flat.numel())
            yield parameter, Place(flat, optimizer, start - begin, stop - start, offset)


def _stage_3(optimizer: Any, rank: int) -> Iterator[tuple[nn.Parameter, Place]]:
    flats = optimizer.fp32_partitioned_groups_flat
    for number, (flat, group) in enumerate(zip(flats, optimizer.fp16_groups, strict=True)):
        used = optimizer.optimizer
        # where a part of the offloaded states stays on the GPU (`ratio`), another one keeps it
        if optimizer.offload_optimizer and optimizer.subgroup_to_device[number] != "cpu":
            used = optimizer.backup_optimizer
        for parameter in group:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, length = _third(parameter, size, rank)
            yield parameter, Place(flat, used, start, length, offset)


def _frozen(parameter: nn.Parameter, rank: int) -> Place:
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return Place(parameter, None)
    return Place(shard, None, *_third(parameter, shard.numel(), rank), 0)


def _third(parameter: nn.Parameter, size: int, rank: int) -> tuple[int, int]:
    """Start and length of a rank's piece under ZeRO-3, without its padding."""
    whole = whole_shape(parameter).numel()
    start = min(rank * size, whole)
    return start, min(size, whole - start)


def _offsets(group: list[nn.Parameter]) -> list[int]:
    offsets = [0]
    for parameter in group:
        offsets.append(offsets[-1] + parameter.numel())
    return offsets[:-1]
