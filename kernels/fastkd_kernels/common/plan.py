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
from torch.autograd import forward_ad

from .remembered import PLAIN, Recent, is_eager, lasts, place

# takes what is left of a call's arguments, and gives what the call does
Plan = Callable[..., Any]
Look = Hashable

PLAIN_OR_NONE = PLAIN | {type(None)}
# several attributes in one call
_seen = attrgetter("shape", "dtype", "device", "requires_grad")
_stride, _address = Tensor.stride, Tensor.data_ptr
# of options that may tell plans apart
_OPTIONS = frozenset((str, bool, int, float, type(None)))

_plans: Recent[Plan] = Recent()


def look_of_call(what: Hashable, tensors: Sequence[Any]) -> Look | None:
    """What plans may depend on: `what`, modes of torch, and tensors but for addresses and values.

    Of an address it has what Triton's launcher tells apart, whether 16 divides it, and by how much
    it does not. None if this call must see for itself: it is traced or captured into a graph, in
    forward mode, or what is given is no plain tensor. The first one is a tensor.
    """
    kinds = (*map(type, tensors),)
    if forward_ad._current_level >= 0 or not is_eager() or not PLAIN_OR_NONE.issuperset(kinds):
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


def look_of_options(options: Sequence[object], tensors: Sequence[Any]) -> Look | None:
    """`look_of_call` of what a user gave; None also where an option is of no plain type."""
    kinds = (*map(type, options),)
    if not _OPTIONS.issuperset(kinds):
        return None
    # equal options of other types, such as 1 and True, are others
    return look_of_call((*options, *kinds), tensors)


def plan_for(look: Look | None, make: Callable[[], Plan]) -> Plan:
    """The plan of calls with this look: the one that they have, or what `make` gives."""
    if look is None:
        return make()
    plan = _plans.get(look)
    if plan is None:
        plan = make()
        _plans.put(look, plan)
    return plan


def plan_by_shape(
    keys: Sequence[Hashable], plan_of: Callable[..., Plan], columns: Any, *shared: Any
) -> Plan:
    """Takes `columns` and `shared`, as `plan_of` and its plans do, and gives losses `[pairs]`.

    `columns` is a named tuple of lists over pairs. There is one plan for each set of pairs with the
    same key, and it takes the columns cut to that set. Layers of one model share their shapes, so
    this is one plan in practice.
    """
    members: dict[Hashable, list[int]] = {}
    for pair, key in enumerate(keys):
        members.setdefault(key, []).append(pair)
    if len(members) == 1:
        return plan_of(columns, *shared)

    def cut(columns: Any, group: list[int]) -> Any:
        return columns._make([[column[pair] for pair in group] for column in columns])

    plans = [(group, plan_of(cut(columns, group), *shared)) for group in members.values()]
    order = [pair for group in members.values() for pair in group]
    places = [order.index(pair) for pair in range(len(order))]
    in_order = order == sorted(order)

    def run(columns: Any, *shared: Any) -> Tensor:
        losses = torch.cat([plan(cut(columns, group), *shared) for group, plan in plans])
        return losses if in_order else torch.stack([losses[place] for place in places])

    return run


def losses_in(plan: Plan, first: torch.dtype) -> Plan:
    """The plan with its losses in fp64 where the first student is `first` of fp64, else in fp32."""
    dtype = torch.float64 if first == torch.float64 else torch.float32

    def run(*arguments: Any) -> Tensor:
        losses: Tensor = plan(*arguments)
        return losses if losses.dtype == dtype else losses.to(dtype)

    return run
