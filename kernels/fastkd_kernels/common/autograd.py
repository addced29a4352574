"""What every op shares around its kernels: registration, divisors, unit gradients, shape groups.

A unit gradient is the gradient of the undivided sum, in fp32, made in the forward pass; the
backward multiplies it by `upstream / count` on the device. That of squares is over two, and
multiplied by twice as much.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..types import NAMESPACE
from .remembered import PLAIN, forgetting, is_eager

# arguments of a call, or what its backward needs of it, by name
Named = SimpleNamespace


def register(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[[Named], Any],
    keep: Callable[[Named, tuple[Tensor, ...]], Mapping[str, Any]] | None = None,
    gradient: Callable[[Named, Tensor], Mapping[str, Any]] | None = None,
) -> Callable[..., Any]:
    """`forward` as an op of torch, whose annotated arguments are the schema: it stands once.

    `fake` makes empty outputs from the arguments by name. The first output is the losses; no other
    has a gradient. `keep` names what the backward needs of arguments and outputs (tensors, lists of
    tensors, plain values). From that and the losses' upstream gradient, `gradient` makes those of
    arguments, by name: a list of tensors may get one tensor, stacked. What it leaves out gets none.

    What is returned takes the op's arguments. An eager call goes around torch's
    dispatcher, which takes lists of tensors apart in Python, to `forward` and an autograd function
    of this op; it returns the losses alone where there will be a backward. Every other call,
    traced or under a mode, is one of the registered op.
    """
    names = tuple(signature(forward).parameters)

    def named(arguments: Sequence[Any]) -> Named:
        return Named(**dict(zip(names, arguments, strict=True)))

    @wraps(forward)
    def dispatched(*arguments: Any) -> Any:
        # a compiled graph may be captured, and owns what is made meanwhile
        with forgetting(), device_guard(arguments):
            return forward(*arguments)

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", dispatched, mutates_args=())
    op.register_fake(lambda *arguments: fake(named(arguments)))
    if keep is None or gradient is None:
        eager_function = None
    else:
        _register_autograd(op, named, keep, gradient)
        eager_function = _eager_function(name, forward, named, keep, gradient)

    def call(*arguments: Any, **more: Any) -> Any:
        arguments += tuple([more[word] for word in names[len(arguments) :]])
        if not is_eager():
            return op(*arguments)
        tensors = [*_tensors(arguments)]
        if not all([type(tensor) in PLAIN for tensor in tensors]):
            return op(*arguments)
        if eager_function is not None and torch.is_grad_enabled():
            trained = [tensor for tensor in tensors if tensor.requires_grad]
            if trained:
                return (eager_function.apply(arguments, *trained),)
        with device_guard(arguments):
            return forward(*arguments)

    return call


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors among arguments and in their lists, in order."""
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from [one for one in value if isinstance(one, Tensor)]


def device_guard(arguments: Sequence[Any]) -> AbstractContextManager[Any]:
    """Makes the first tensor's GPU the current one, on which Triton launches."""
    first = next(_tensors(arguments))
    return torch.cuda.device(first.device) if first.is_cuda else nullcontext()


class _Kept:
    """What a backward needs: tensors in autograd's care, of which `kept` has the places."""

    def __init__(self, ctx: Any, values: Mapping[str, Any]) -> None:
        tensors: list[Tensor | None] = []
        self.places: dict[str, int | slice] = {}
        self.plain: dict[str, Any] = {}
        for word, value in values.items():
            if isinstance(value, Tensor):
                self.places[word] = len(tensors)
                tensors.append(value)
            elif _is_list(value):
                self.places[word] = slice(len(tensors), len(tensors) + len(value))
                tensors += value
            else:
                self.plain[word] = value
        ctx.save_for_backward(*tensors)

    def named(self, ctx: Any) -> Named:
        saved = ctx.saved_tensors
        return Named(**self.plain, **{word: saved[at] for word, at in self.places.items()})


def _eager_function(
    name: str,
    forward: Callable[..., Any],
    named: Callable[[Sequence[Any]], Named],
    keep: Callable[[Named, tuple[Tensor, ...]], Mapping[str, Any]],
    gradient: Callable[[Named, Tensor], Mapping[str, Any]],
) -> Any:
    """Losses of arguments in a tuple; what of them is trained stands behind it once more."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, arguments: tuple[Any, ...], *trained: Tensor) -> Tensor:
            with device_guard(trained):
                made = forward(*arguments)
            given = named(arguments)
            ctx.kept = _Kept(ctx, keep(given, made))
            ctx.trained = [
                (word, place)
                for word, value in vars(given).items()
                for place in _trained_places(value)
            ]
            losses: Tensor = made[0]
            return losses

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
            with device_guard((upstream,)):
                made = dict(gradient(ctx.kept.named(ctx), upstream))
            for word, value in made.items():
                if isinstance(value, Tensor) and any(
                    place is not None for of, place in ctx.trained if of == word
                ):
                    made[word] = value.unbind()
            return None, *(
                of if of is None or place is None else of[place]
                for of, place in ((made.get(word), place) for word, place in ctx.trained)
            )

    Eager.__name__ = Eager.__qualname__ = name
    return Eager


def _trained_places(value: Any) -> list[int | None]:
    """Of a tensor [None] if it is trained; of a list the places of tensors that are."""
    if isinstance(value, Tensor):
        return [None] if value.requires_grad else []
    if isinstance(value, (list, tuple)):
        return [
            place
            for place, one in enumerate(value)
            if isinstance(one, Tensor) and one.requires_grad
        ]
    return []


def _register_autograd(
    op: Any,
    named: Callable[[Sequence[Any]], Named],
    keep: Callable[[Named, tuple[Tensor, ...]], Mapping[str, Any]],
    gradient: Callable[[Named, Tensor], Mapping[str, Any]],
) -> None:
    """Autograd of the registered op, for traces."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        given = named(inputs)
        ctx.counts = {
            word: len(value) if _is_list(value) else None for word, value in vars(given).items()
        }
        ctx.set_materialize_grads(False)
        ctx.kept = _Kept(ctx, keep(given, output))

    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        made: Mapping[str, Any] = {}
        if upstream is not None:
            made = gradient(ctx.kept.named(ctx), upstream)
        given = ((made.get(word), count) for word, count in ctx.counts.items())
        return tuple(
            value if count is None else [None] * count if value is None else list(value)
            for value, count in given
        )

    op.register_autograd(backward, setup_context=save)


def _is_list(value: Any) -> bool:
    """Whether this is a list of tensors."""
    return isinstance(value, (list, tuple)) and all(isinstance(one, Tensor) for one in value)


def accumulator(*tensors: Tensor) -> torch.dtype:
    """fp64 where an input is fp64, fp32 otherwise."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def inverse(count: Tensor | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`1 / count` as a scalar on `device`, and 0 where nothing is counted."""
    if isinstance(count, int):
        return torch.full((), 1.0 / count if count else 0.0, dtype=dtype, device=device)
    return torch.where(count > 0, 1.0 / count.clamp(min=1).to(dtype), 0.0).to(dtype)


def value_of(squares: Tensor, inverse_count: Tensor) -> Tensor:
    """Loss `[pairs]` from sums of squares, which rounding can leave slightly below 0."""
    return squares.clamp(min=0.0) * inverse_count


def squared_sum(value: Tensor) -> Tensor:
    """Sum of squares, without a squared copy.

    Row by row, because one running fp32 sum over a million entries loses 1e-5 of itself.
    """
    rows: Tensor = torch.linalg.vector_norm(value, dim=-1)
    return rows.square().sum()


def scaled(unit: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit gradients `[pairs, ...]` times `factor`, `[pairs]` or `[pairs, batch]`, in `dtype`."""
    factor = factor.view(*factor.shape, *[1] * (unit.ndim - factor.ndim))
    if unit.dtype == dtype or (torch.is_grad_enabled() and factor.requires_grad):
        return (unit * factor).to(dtype)
    # one pass, without a product in fp32
    return torch.mul(unit, factor, out=torch.empty_like(unit, dtype=dtype))


def by_shape(keys: Sequence[Hashable], loss_of: Callable[[list[int]], Tensor]) -> Tensor:
    """`[pairs]` losses from one call of `loss_of` for each set of pairs with the same key.

    Layers of one model share their shapes, so this is one call in practice.
    """
    members: dict[Hashable, list[int]] = {}
    for pair, key in enumerate(keys):
        members.setdefault(key, []).append(pair)
    if len(members) == 1:
        return loss_of(list(range(len(keys))))
    order = [pair for group in members.values() for pair in group]
    losses = torch.cat([loss_of(group) for group in members.values()])
    if order == sorted(order):
        return losses
    return torch.stack([losses[order.index(pair)] for pair in range(len(keys))])
