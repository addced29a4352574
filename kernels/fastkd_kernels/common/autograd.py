"""What every op shares around its kernels: registration, divisors, unit gradients.

A unit gradient is the gradient of the undivided sum, in fp32, made in the forward pass; the
backward multiplies it by `upstream / count` on the device. That of squares is over two, and
multiplied by twice as much.

So a backward computes what is linear in the upstream gradient and constant in all else. Under
`create_graph` it says so: its gradients may be differentiated by the upstream one, and nothing may
ask them for a derivative by what the op was given.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from inspect import signature
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..types import NAMESPACE
from .fp32_products import fp32_products, without_autocast
from .plan import PLAIN_OR_NONE, look_of_call, plan_for
from .remembered import forgetting, is_eager

# arguments of a call, or what its backward needs of it, by name
Named = SimpleNamespace
# what the backward needs, from arguments and outputs; gradients, from that and the upstream one
Keep = Callable[[Named, tuple[Tensor, ...]], Mapping[str, Any]]
Gradient = Callable[[Named, Tensor], Mapping[str, Any]]


def planned(plan: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
    """The forward of an op with plans: `plan` takes the op's arguments and returns what takes them.

    What it returns goes for all arguments that look like those, and keeps no tensor of theirs.
    """

    @wraps(plan)
    def forward(*arguments: Any) -> Any:
        return plan(*arguments)(*arguments)

    outputs = get_args(get_type_hints(plan)["return"])[1]
    vars(forward)["plan"] = plan
    vars(forward)["__signature__"] = signature(plan).replace(return_annotation=outputs)
    return forward


def register(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[[Named], Any],
    keep: Keep | None = None,
    gradient: Gradient | None = None,
) -> "Op":
    """`forward` as an op of torch, whose annotated arguments are the schema: it stands once.

    `fake` makes empty outputs from the arguments by name. The first output is the losses; no other
    has a gradient. `keep` names what the backward needs of arguments and outputs (tensors, lists of
    tensors, plain values). From that and the losses' upstream gradient, `gradient` makes those of
    arguments, by name: a list of tensors may get one tensor, stacked. What it leaves out gets none.

    What is returned takes the op's arguments. An eager call goes around torch's dispatcher, which
    takes lists of tensors apart in Python, to `forward` and an autograd function of this op, and
    returns the losses alone where there will be a backward. A call that is traced, or under a mode,
    is one of the registered op.
    """
    return Op(name, forward, fake, keep, gradient)


class Op:
    """What `register` makes."""

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fake: Callable[[Named], Any],
        keep: Keep | None,
        gradient: Gradient | None,
    ) -> None:
        self.name = name
        self.names = tuple(signature(forward).parameters)
        hints = get_type_hints(forward)
        # places of tensors among the arguments, and whether a list stands there
        self.slots = [
            (at, kind == Sequence[Tensor])
            for at, kind in enumerate(hints[word] for word in self.names)
            if kind in (Tensor, Tensor | None, Sequence[Tensor])
        ]
        self.backend_at = self.names.index("backend") if "backend" in self.names else None
        self.forward = forward
        self.plan: Callable[..., Callable[..., Any]] | None = getattr(forward, "plan", None)

        @wraps(forward)
        def dispatched(*arguments: Any) -> Any:
            # a compiled graph may be captured, and owns what is made meanwhile
            with forgetting():
                return self.run(forward, arguments)

        self.registered = torch.library.custom_op(
            f"{NAMESPACE}::{name}", dispatched, mutates_args=()
        )
        self.registered.register_fake(lambda *arguments: fake(self.named(arguments)))
        self.function = None
        if keep is not None and gradient is not None:
            _register_autograd(name, self.registered, self.named, keep, gradient)
            self.function = _function(name, self.run, self.named, keep, gradient)

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        if more:
            arguments += tuple([more[word] for word in self.names[len(arguments) :]])
        if self.plan is None or not is_eager():
            return self.planned(arguments)(arguments)
        tensors: list[Any] = []
        plain = list(arguments)
        for at, many in self.slots:
            given = arguments[at]
            plain[at] = len(given) if many else None
            tensors += given if many else (given,)
        options = tuple([tuple(one) if isinstance(one, (list, tuple)) else one for one in plain])
        look = look_of_call((self.name, options), tensors)
        return plan_for(look, partial(self.planned, arguments))(arguments)

    def planned(self, arguments: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
        """The call for all arguments that look like these."""
        if forward_ad._current_level >= 0:
            self.refuse_tangents(arguments)
        if not is_eager():
            return lambda arguments: self.registered(*arguments)
        columns = [arguments[at] if many else (arguments[at],) for at, many in self.slots]
        if not all([PLAIN_OR_NONE.issuperset(map(type, column)) for column in columns]):
            return lambda arguments: self.registered(*arguments)
        forward = self.forward if self.plan is None else self.run(self.plan, arguments)
        # of what is trained among the arguments
        trained: list[tuple[int, int | None]] = []
        function = self.function
        if function is not None and torch.is_grad_enabled():
            trained = [
                (at, place if many else None)
                for (at, many), column in zip(self.slots, columns, strict=True)
                for place, tensor in enumerate(column)
                if tensor is not None and tensor.requires_grad
            ]
        if function is None or not trained:
            return partial(self.run, forward)
        places = [(self.names[at], place) for at, place in trained]

        def call(arguments: Sequence[Any]) -> Any:
            given = [
                arguments[at] if place is None else arguments[at][place] for at, place in trained
            ]
            return function.apply(forward, arguments, places, *given)

        return call

    def refuse_tangents(self, arguments: Sequence[Any]) -> None:
        """Refuse what would lose its derivative in forward mode, which plans don't see."""
        tensors = [arguments[at] if many else (arguments[at],) for at, many in self.slots]
        for tensor in itertools.chain(*tensors):
            if tensor is None:
                continue
            _, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
            if tangent is not None:
                raise NotImplementedError(
                    f"{self.name} has no derivative in forward mode (torch.func.jvp, "
                    "torch.autograd.forward_ad), got a tensor with a tangent: use backward"
                )

    def named(self, arguments: Sequence[Any]) -> Named:
        given = Named()
        vars(given).update(zip(self.names, arguments, strict=True))
        return given

    def run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """`function` of the arguments, on the GPU of the first tensor."""
        at, many = self.slots[0]
        tensor = arguments[at][0] if many else arguments[at]
        if self.backend_at and arguments[self.backend_at] == "torch":
            fp32 = fp32_products() if tensor.is_cuda else nullcontext()
            with without_autocast(tensor.device.type), fp32:
                return on_its_device(tensor, function, arguments)
        return on_its_device(tensor, function, arguments)


def _function(
    name: str,
    run: Callable[[Callable[..., Any], Sequence[Any]], Any],
    named: Callable[[Sequence[Any]], Named],
    keep: Keep,
    gradient: Gradient,
) -> Any:
    """Losses of arguments in a tuple; what of them is trained follows, and where it stands.

    The output behind them is none for the caller: it ties a differentiated gradient to the inputs.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            forward: Callable[..., Any],
            arguments: tuple[Any, ...],
            places: list[tuple[str, int | None]],
            *trained: Tensor,
        ) -> tuple[Tensor, Tensor]:
            made = run(forward, arguments)
            # none where nothing asks for a gradient, as of the second output
            ctx.set_materialize_grads(False)
            ctx.places = places
            ctx.kept = _Kept(ctx, keep(named(arguments), made), made[1])
            return made[0], made[1]

        @staticmethod
        def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
            made = _gradients(name, ctx, gradient, upstream)
            parts = {}
            grads = []
            for word, place in ctx.places:
                value = made.get(word)
                if place is not None and value is not None:
                    if word not in parts:
                        parts[word] = value.unbind() if isinstance(value, Tensor) else value
                    value = parts[word][place]
                grads.append(value)
            return None, None, None, *grads

    Eager.__name__ = Eager.__qualname__ = name
    return Eager


def on_its_device(tensor: Tensor, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """A call with the tensor's GPU as the current one, on which Triton launches."""
    if not tensor.is_cuda:
        return function(*arguments)
    with torch.cuda.device(tensor.device):
        return function(*arguments)


class _Kept:
    """What a backward needs: tensors, in autograd's care, by their places, and plain values.

    `tie` is an output of the function, which leads to the inputs without keeping them.
    """

    def __init__(self, ctx: Any, values: Mapping[str, Any], tie: Tensor) -> None:
        tensors: list[Tensor | None] = []
        self.places: dict[str, int | slice] = {}
        self.plain: dict[str, Any] = {}
        for word, value in values.items():
            if _is_inferred(value):
                # autograd takes no tensor of inference mode; nothing tells whether it is written to
                self.plain[word] = value
            elif isinstance(value, Tensor):
                self.places[word] = len(tensors)
                tensors.append(value)
            elif _is_list(value):
                self.places[word] = slice(len(tensors), len(tensors) + len(value))
                tensors += value
            else:
                self.plain[word] = value
        # most keep it anyway, and hooks such as `save_on_cpu` would copy it twice
        same = (at for at, tensor in enumerate(tensors) if tensor is tie)
        self.tie = next(same, len(tensors))
        if self.tie == len(tensors):
            tensors.append(tie)
        ctx.save_for_backward(*tensors)

    def named(self, ctx: Any) -> tuple[Named, Tensor]:
        """All of them by name, and the tie."""
        saved = ctx.saved_tensors
        named = Named(**self.plain, **{word: saved[at] for word, at in self.places.items()})
        return named, saved[self.tie]


def _gradients(
    name: str, ctx: Any, gradient: Gradient, upstream: Tensor | None
) -> Mapping[str, Any]:
    """What `gradient` makes of what `ctx` kept, by name."""
    if upstream is None:
        return {}
    kept, tie = ctx.kept.named(ctx)
    if not torch.is_grad_enabled():
        return gradient(kept, upstream)
    specs = []

    def made(upstream: Tensor) -> list[Tensor | None]:
        # a gradient may take names out of what it is given
        leaves, spec = tree_flatten(dict(gradient(Named(**vars(kept)), upstream)))
        specs.append(spec)
        return leaves

    leaves = _apply(_Differentiable, made, upstream, _apply(_NoSecond, name, tie))
    by_name: Mapping[str, Any] = tree_unflatten(leaves, specs[0])
    return by_name


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


class _NoSecond(torch.autograd.Function):
    """A zero that leads to where `tie` does, and refuses to be differentiated by that."""

    @staticmethod
    def forward(ctx: Any, name: str, tie: Tensor) -> Tensor:
        ctx.name = name
        return tie.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            f"{ctx.name} has no second derivative by what it was given: differentiate its "
            "gradients by their upstream gradient alone, or take the op of "
            "fastkd_kernels.reference"
        )


class _Differentiable(torch.autograd.Function):
    """`made` of an upstream gradient `[losses]`, in which it is linear.

    `tie` is a zero, through which goes any derivative by what else `made` depends on.
    """

    @staticmethod
    def forward(
        ctx: Any, made: Callable[[Tensor], list[Tensor | None]], upstream: Tensor, tie: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.made = made
        ctx.save_for_backward(upstream, tie)
        return tuple(made(upstream))

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[None, Tensor | None, Tensor]:
        upstream, tie = ctx.saved_tensors
        nothing = torch.zeros_like(tie)
        if not ctx.needs_input_grad[1]:
            return None, None, nothing
        by_loss = []
        for one in torch.eye(len(upstream), dtype=upstream.dtype, device=upstream.device):
            with torch.no_grad():
                units = ctx.made(one)
            products = [
                (unit.to(one.dtype) * second.to(one.dtype)).sum()
                for unit, second in zip(units, seconds, strict=True)
                if unit is not None and second is not None
            ]
            by_loss.append(torch.stack(products).sum())
        return None, torch.stack(by_loss) + tie, nothing


def _register_autograd(
    name: str, op: Any, named: Callable[[Sequence[Any]], Named], keep: Keep, gradient: Gradient
) -> None:
    """Autograd of the registered op, for traces."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        given = named(inputs)
        ctx.counts = {
            word: len(value) if _is_list(value) else None for word, value in vars(given).items()
        }
        ctx.set_materialize_grads(False)
        ctx.kept = _Kept(ctx, keep(given, output), output[1])

    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        made = _gradients(name, ctx, gradient, upstream)
        given = ((made.get(word), count) for word, count in ctx.counts.items())
        return tuple(
            value if count is None else [None] * count if value is None else list(value)
            for value, count in given
        )

    op.register_autograd(backward, setup_context=save)


def _is_inferred(value: Any) -> bool:
    """Whether this is, or has in it, a tensor of inference mode."""
    if isinstance(value, Tensor):
        return value.is_inference()
    return _is_list(value) and True in map(Tensor.is_inference, value)


def _is_list(value: Any) -> bool:
    """Whether this is a list of tensors."""
    return isinstance(value, (list, tuple)) and (not value or isinstance(value[0], Tensor))


def accumulator(*tensors: Tensor) -> torch.dtype:
    """fp64 where an input is fp64, fp32 otherwise."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def inverse(count: Tensor | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`1 / count` on `device`, as a scalar for an int, and 0 where nothing is counted."""
    if isinstance(count, int):
        return torch.full((), 1.0 / count if count else 0.0, dtype=dtype, device=device)
    return count.to(dtype).reciprocal().nan_to_num_(posinf=0.0)


def value_of(squares: Tensor, inverse_count: Tensor) -> Tensor:
    """Loss `[pairs]` from sums of squares, which rounding can leave slightly below 0; in place."""
    return squares.relu_().mul_(inverse_count)


def squared_sum(value: Tensor) -> Tensor:
    """Sum of squares, without a squared copy.

    Row by row, because one running fp32 sum over a million entries loses 1e-5 of itself.
    """
    rows: Tensor = torch.linalg.vector_norm(value, dim=-1)
    return rows.square().sum()


def scaled(unit: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit gradients `[pairs, ...]` times `factor`, `[pairs]` or `[pairs, batch]`, in `dtype`."""
    factor = factor.view(*factor.shape, *[1] * (unit.ndim - factor.ndim))
    if unit.dtype == dtype:
        return (unit * factor).to(dtype)
    # one pass, without a product in fp32
    return torch.mul(unit, factor, out=torch.empty_like(unit, dtype=dtype))
