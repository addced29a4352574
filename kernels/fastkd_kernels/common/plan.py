"""Plans: all that the host does for a call and that the looks of its tensors decide, done once.

A training step brings new tensors that look as those of the last step did. What their checks say,
which kernel takes them, its blocks, grid and constants, the layout of its table and the shapes of
its outputs are the same then. So an op's host work has two parts: one makes a plan, a function that
keeps no tensor of the caller's, and the plan takes tensors. It is found again by a look at them.
The road not taken: CUDA graphs, which would copy every input to where the captured ones lay.
"""

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .remembered import PLAIN, Recent, is_eager, lasts, place

# takes what is left of a call's arguments, and gives what the call does
Plan = Callable[..., Any]
Look = Hashable

PLAIN_OR_NONE = PLAIN | {type(None)}
# several attributes in one call
_seen = attrgetter("shape", "dtype", "device", "requires_grad")
_stride, _address = Tensor.stride, Tensor.data_ptr

_plans: Recent[Plan] = Recent()


def look_of_call(what: Hashable, tensors: Sequence[Any]) -> Look | None:
    """What plans may depend on: `what`, modes of torch, and tensors but for addresses and values.

    Of an address it has what Triton's launcher tells apart, whether 16 divides it, and by how much
    it does not. None if this call must see for itself: it is traced or captured into a graph, or
    what is given is no plain tensor. The first one is a tensor.
    """
    kinds = (*map(type, tensors),)
    if not is_eager() or not PLAIN_OR_NONE.issuperset(kinds):
        return None
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    if not lasts(device):
        return None
    return (
        what,
        kinds,
        # what a plan keeps is ready on the stream of its making
        place(device),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *map(_seen, given),
        *map(_stride, given),
        *[address % 16 for address in map(_address, given)],
    )


def plan_for(look: Look | None) -> Plan | None:
    return None if look is None else _plans.get(look)


def keep_plan(look: Look | None, plan: Plan) -> None:
    if look is not None:
        _plans.put(look, plan)
