"""Run a model's attention through a listener, or leave it alone.

transformers looks its attention function up by name in a public registry. fastkd registers one
function per implementation (`fastkd-sdpa`, `fastkd-flash_attention_2`, ...) that hands query, key
and value of the blocks that someone listens to over and then calls the implementation itself: both
models stay on their fast path, and outputs are bit for bit those without fastkd. Masks are made by
transformers too, but never read to see whether they hide anything. Nothing global
knows who is listening: listeners are an attribute of the attention module for the time of one
`with`, so recomputation under gradient checkpointing, which runs after it, is never recorded.

The road not taken: `output_attentions=True` forces eager attention in all layers and stores
[batch, heads, tokens, tokens] for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from fastkd_kernels import AttentionState
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fastkd.errors import UserError, one_line

PREFIX = "fastkd-"
_LISTENERS = "_fastkd_listeners"
_AS_IT_IS = nullcontext()


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function: what it was given, and the function itself."""

    state: AttentionState
    mask: Tensor | None
    """Bool, True where a query sees a key, or added to the scores; `None` where the module's flag
    alone says whether attention is causal."""
    causal_flag: bool
    """What that flag says."""
    given: dict[str, Any]
    """Further keywords."""
    again: Callable[[torch.dtype], Tensor]
    """What the implementation makes of the same numbers in another precision, [batch, tokens,
    heads, head_dim]."""


Listener = Callable[[AttentionCall], None]


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Let `model` run `implementation`, as transformers itself does.

    A model that brings its own attention, outside of transformers' interface, keeps it.

    Raises:
        UserError: transformers refuses the implementation for this model or this machine.
    """
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{type(model).__name__} can't run attention {implementation!r} here "
            f"({one_line(error)}); try attention: "
            f"{_other(model, implementation)}"
        ) from error


def route_attention(model: PreTrainedModel, implementation: str | None = None) -> None:
    """Let `model` run `implementation`, or the one that it runs already, through the listener.

    Raises:
        UserError: transformers refuses the implementation for this model or this machine, or the
            model's attention does not go through transformers' attention interface.
    """
    if implementation is not None:
        set_attention(model, implementation)
    if not model._can_set_attn_implementation():
        raise UserError(
            f"{type(model).__name__}: its attention does not go through transformers' attention "
            "interface, so it can't be captured; leave losses.attention and losses.relations out, "
            "or give a model whose attention does"
        )
    # where flash attention is not installed transformers may choose a kernel of the same kind
    running = model.config._attn_implementation
    if is_routed(model):
        return
    name = PREFIX + running
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, listening_function(running))
        if running in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            make_mask = _unread(ALL_MASK_ATTENTION_FUNCTIONS[running], running)
            AttentionMaskInterface.register(name, make_mask)
    # the setter above would try to load a flash kernel of this name
    model.config._attn_implementation = name


def is_routed(model: PreTrainedModel) -> bool:
    """Whether a model's attention goes through the listener."""
    return str(model.config._attn_implementation).startswith(PREFIX)


class _LentName(str):
    """The name of a listening function, of which copies and pickles are the model's own name: they
    outlive the context, and another process knows no listener."""

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.removeprefix(PREFIX),)


@contextmanager
def routed(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` run through the listener while the context is open; copies and pickles that are
    made of it meanwhile run without.

    Raises:
        UserError: as `route_attention`.
    """
    running = model.config._attn_implementation
    if not is_routed(model):
        route_attention(model)
        model.config._attn_implementation = _LentName(model.config._attn_implementation)
    try:
        yield
    finally:
        model.config._attn_implementation = running


@contextmanager
def listening(block: nn.Module, listener: Listener) -> Iterator[None]:
    """Let `listener` hear every attention inside a block while the context is open."""
    # a module may stand in a block twice
    parts = {id(module): module.__dict__ for module in inside(block)}.values()
    for part in parts:
        part[_LISTENERS] = *part.get(_LISTENERS, ()), listener
    try:
        yield
    finally:
        # others may have come since, and leave later
        for part in parts:
            left = tuple(other for other in part[_LISTENERS] if other is not listener)
            if left:
                part[_LISTENERS] = left
            else:
                del part[_LISTENERS]


def inside(module: nn.Module) -> list[nn.Module]:
    """`module.modules()`, some perhaps twice: torch also makes the name of each, and a step asks
    for every block that it captures."""
    found = [module]
    for child in module._modules.values():
        if child is not None:
            found += inside(child)
    return found


@contextmanager
def runnable(model: PreTrainedModel) -> Iterator[None]:
    """Models are tried before they move to their GPU, and flash attention runs nowhere else."""
    name = model.config._attn_implementation
    if model.device.type != "cpu" or "flash" not in name:
        yield
        return
    model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    if name.startswith(PREFIX):
        route_attention(model)
    try:
        yield
    finally:
        model.config._attn_implementation = name


def _other(model: PreTrainedModel, refused: str) -> str:
    """An implementation that a model can run everywhere, other than the one refused."""
    return "sdpa" if refused != "sdpa" and model._supports_sdpa else "eager"


def listening_function(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function that lets a listener hear, and calls an implementation."""
    flash = "flash" in implementation

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if implementation == "eager":
            function = eager_function(type(module))
        else:
            function = ALL_ATTENTION_FUNCTIONS[implementation]
        tensors = query, key, value, attention_mask
        listeners: tuple[Listener, ...] = module.__dict__.get(_LISTENERS, ())
        if listeners:
            # the one that came last hears alone
            listeners[-1](_call(module, function, tensors, scaling, kwargs, implementation))
        with _plain_name(module, implementation) if flash else _AS_IT_IS:
            result: tuple[Tensor, Tensor | None] = function(
                module, *tensors, scaling=scaling, **kwargs
            )
        return result

    return attend


def eager_function(kind: type[nn.Module]) -> Callable[..., Any]:
    """The eager function of an attention class: it lives beside the forward that calls it, not in
    the registry, and a subclass elsewhere may call or inherit that.

    Raises:
        UserError: there is none.
    """
    for base in kind.__mro__:
        if "forward" in vars(base):
            names = inspect.unwrap(vars(base)["forward"]).__globals__
            if "eager_attention_forward" in names:
                found: Callable[..., Any] = names["eager_attention_forward"]
                return found
    raise UserError(
        f"{kind.__name__} has no eager_attention_forward beside its forward, so its eager "
        "attention can't be captured; leave losses.attention and losses.relations out, or take sdpa"
    )


def _call(
    module: nn.Module,
    function: Callable[..., tuple[Tensor, Tensor | None]],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    scaling: float | None,
    keywords: dict[str, Any],
    implementation: str,
) -> AttentionCall:
    """What a listener is told of queries, keys, values and their mask."""

    def again(dtype: torch.dtype) -> Tensor:
        cast = [_in(dtype, tensor) for tensor in tensors]
        given = {name: _in(dtype, value) for name, value in keywords.items()}
        output: Tensor = function(module, *cast, scaling=scaling, **given)[0]
        return output

    query, key, value, mask = tensors
    flag = keywords.get("is_causal")
    flag = getattr(module, "is_causal", True) if flag is None else flag
    # an eager function without a mask hides nothing
    causal = bool(flag) and implementation != "eager"
    return AttentionCall(
        _state(query, key, value, scaling, keywords), mask, causal, keywords, again
    )


def hiding_nothing(ids: Tensor) -> Tensor:
    """A padding mask [batch, tokens] that hides nothing: one number at all places, which its
    strides say without a read. Of a decoder without a mask transformers would read the positions,
    to see whether several sequences follow each other in a row."""
    return torch.ones((), dtype=torch.bool, device=ids.device).expand(ids.shape)


def _unread(make_mask: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    """A mask function that takes a mask for padding without reading it: transformers' own looks at
    each for padding, which waits for the device. Whoever has no padding gives no mask, or one of
    `hiding_nothing`."""

    def make(
        *,
        q_length: int,
        kv_length: int,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        **kwargs: Any,
    ) -> Any:
        padded = attention_mask is not None and attention_mask.stride(-1) != 0
        may_skip = allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == kv_length)
        fits = local_size is None or kv_length < local_size
        # while a graph is compiled or recorded transformers would make a mask of it
        if implementation == "sdpa" and may_skip and fits and not padded:
            return None
        return make_mask(
            q_length=q_length,
            kv_length=kv_length,
            attention_mask=attention_mask if padded else None,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip and not padded,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip and not padded,
            **kwargs,
        )

    return make


def _in(dtype: torch.dtype, given: Any) -> Any:
    return given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given


def _state(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, given: dict[str, Any]
) -> AttentionState:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = given.get("s_aux")
    # a sharded student's parameter is gone once its layer has run
    kept = None if sinks is None else sinks.clone()
    return AttentionState(query, key, value, scale, given.get("softcap"), kept)


@contextmanager
def _plain_name(module: nn.Module, implementation: str) -> Iterator[None]:
    """Flash attention looks up in the configuration which of its kernels to load."""
    config: Any = module.config
    running = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = running
