"""Take what the losses need from a model's forward pass, without ever asking for attention maps.

transformers looks its attention function up by name in a public registry. fastkd registers one
function per implementation (`fastkd-sdpa`, `fastkd-flash_attention_2`, ...) that notes the query,
key and value of the blocks that someone listens to and then calls the implementation itself: both
models stay on their fast path, and outputs are bit for bit those without fastkd. Hidden states
come from forward hooks on the blocks. Nothing global knows who is listening: a listener is an
attribute of the attention module for the time of one `with capture(...)`, so recomputation under
gradient checkpointing, which runs after it, is never recorded.

The road not taken: `output_attentions=True` forces eager attention in all layers and stores
[batch, heads, tokens, tokens] for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fastkd_kernels import AttentionState, LogitsHead
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fastkd.errors import UserError
from fastkd.heads import check_head, last_layer, recorded_head

_PREFIX = "fastkd-"
_LISTENER = "_fastkd_listener"


@dataclass
class Capture:
    """What one forward pass left, by layer number (`fastkd.layer_map` has the convention).

    `attention[i]` holds query [batch, heads, tokens, head_dim], key and value
    [batch, kv_heads, tokens, head_dim] and the scale of block i, after rotary embeddings and before
    grouped heads are repeated; `hidden[i]` is [batch, tokens, width]. `logits` is what the head
    gave, [batch, outputs], or of a language model what its last layer would have multiplied.
    """

    attention: dict[int, AttentionState] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | LogitsHead | None = None


def route_attention(model: PreTrainedModel, implementation: str) -> None:
    """Let `model` run `implementation` through fastkd's listener.

    Raises:
        UserError: transformers refuses the implementation for this model or this machine.
    """
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{type(model).__name__} can't run attention {implementation!r} here "
            f"({' '.join(str(error).split())}); try attention: sdpa"
        ) from error
    # where flash attention is not installed transformers may choose a kernel of the same kind
    running = model.config._attn_implementation
    name = _PREFIX + running
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _listening(running))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[running])
    # the setter above would try to load a flash kernel of this name
    model.config._attn_implementation = name


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a model, in order.

    Raises:
        UserError: no list, or more than one list, has as many modules as the config has layers, or
            the model is an encoder-decoder.
    """
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder; fastkd distils encoders and decoders "
            "with a single stack, so give one of those"
        )
    depth = model.config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise UserError(
            f"{type(model).__name__}: found {len(lists)} stacks of {depth} blocks, expected one; "
            "fastkd distils encoders and decoders with a single stack"
        )
    return lists[0]


@contextmanager
def capture(
    model: PreTrainedModel,
    *,
    attention: Collection[int] = (),
    hidden: Collection[int] = (),
    logits: bool = False,
) -> Iterator[Capture]:
    """Record attention and hidden states of the named layers while the context is open.

    Hooks are attached on entry and removed on exit: ZeRO-3 needs them younger than its own. The
    logits of a language model, [tokens, vocabulary], are not computed meanwhile.

    Args:
        model: routed by `route_attention`, possibly wrapped and sharded since.
        attention: block numbers from 1.
        hidden: layer numbers from 0, the embeddings.
        logits: whether to record what the head gives or takes.
    """
    blocks = find_blocks(model)
    states = Capture()
    with ExitStack() as stack:
        for layer in attention:
            for module in blocks[layer - 1].modules():
                module.__dict__[_LISTENER] = _attention_listener(states, layer)
                stack.callback(module.__dict__.pop, _LISTENER)
        for layer in hidden:
            if layer:
                handle = blocks[layer - 1].register_forward_hook(_output_hook(states, layer))
            else:
                handle = blocks[0].register_forward_pre_hook(_input_hook(states), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(recorded_head(model, states if logits else None))
        yield states


def check_capturable(
    model: PreTrainedModel, tokens: int = 8, field: str = "data.block_size"
) -> None:
    """Run a model once and see that every block can be captured.

    Args:
        model: routed by `route_attention`, on one device.
        tokens: length of the sequence that it is tried on.
        field: of the recipe, which says so.

    Raises:
        UserError: a block's attention does not go through transformers' attention interface, or the
            model has no positions for so many tokens.
    """
    layers = range(1, len(find_blocks(model)) + 1)
    check_positions(model, tokens, field)
    # any id but the padding, whose positions some models don't count
    token = 0 if getattr(model.config, "pad_token_id", None) else 1
    ids = torch.full((1, tokens), token, device=model.device)
    recording = capture(model, attention=layers, hidden=(0, *layers))
    with torch.no_grad(), _runnable(model), recording as states:
        try:
            model(input_ids=ids, **no_cache(model))
        except (IndexError, RuntimeError) as error:
            raise UserError(
                f"{type(model).__name__} can't read {tokens} tokens "
                f"({' '.join(str(error).split())[:200]}); give a smaller {field}"
            ) from error
    if last_layer(model) is not None:
        with _runnable(model):
            check_head(model)
    missing = [layer for layer in layers if layer not in states.attention]
    if missing:
        raise UserError(
            f"{type(model).__name__}: the attention of layers {missing} does not go through "
            "transformers' attention interface, so it can't be captured; give a model whose "
            "attention does"
        )


def check_positions(model: PreTrainedModel, tokens: int, field: str) -> None:
    """See that a model has positions for `tokens` tokens, which `field` of the recipe asks for.

    Raises:
        UserError: it has fewer; rotary models would run on, where they were never trained.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(
            f"{type(model).__name__} has {positions} positions, but {field} is {tokens}; give a "
            "smaller one"
        )


@contextmanager
def _runnable(model: PreTrainedModel) -> Iterator[None]:
    """Models are tried before they move to their GPU, and flash attention runs nowhere else."""
    name = model.config._attn_implementation
    if model.device.type != "cpu" or "flash" not in name:
        yield
        return
    route_attention(model, "sdpa")
    try:
        yield
    finally:
        model.config._attn_implementation = name


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the self-attention of a model sees only earlier tokens."""
    flags = [
        bool(module.is_causal)
        for module in find_blocks(model)[0].modules()
        if hasattr(module, "is_causal")
    ]
    return any(flags)


def vector_widths(model: PreTrainedModel) -> dict[str, int]:
    """Widths of the queries (q), keys (k) and values (v) of a layer, all heads together.

    Empty where the configuration does not say: heads of latent attention have sizes of their own.
    """
    config = model.config
    if hasattr(config, "kv_lora_rank"):
        return {}
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    grouped = size * (getattr(config, "num_key_value_heads", None) or heads)
    return {"q": heads * size, "k": grouped, "v": grouped}


def attention_windows(model: PreTrainedModel) -> dict[int, int]:
    """Of the layers with local attention: keys fewer than so many tokens away are seen.

    Raises:
        UserError: a layer attends in chunks, which no op compares.
    """
    config = model.config
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if size else "full_attention"] * config.num_hidden_layers
    if "chunked_attention" in kinds:
        raise UserError(
            f"{type(model).__name__} attends in chunks, whose probabilities fastkd can't compare; "
            "give losses.attention the kind score_mse, and leave losses.relations out"
        )
    if not size:
        return {}
    # encoders of transformers count the distance itself, decoders the tokens from the query on
    window = size if is_causal(model) else size + 1
    local = [i for i, kind in enumerate(kinds, start=1) if kind == "sliding_attention"]
    return dict.fromkeys(local, window)


def no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """The keyword that keeps a decoder from building a key-value cache."""
    return {"use_cache": False} if getattr(model.config, "use_cache", None) else {}


def _listening(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        listener = module.__dict__.get(_LISTENER)
        if listener is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            listener(AttentionState(query, key, value, scale))
        # a model's eager function lives in its own module, not in the registry
        if implementation == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[implementation]
        with _plain_name(module, implementation):
            result: tuple[Tensor, Tensor | None] = function(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        return result

    return attend


@contextmanager
def _plain_name(module: nn.Module, implementation: str) -> Iterator[None]:
    """Flash attention looks up in the configuration which of its kernels to load."""
    if "flash" not in implementation:
        yield
        return
    config: Any = module.config
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = _PREFIX + implementation


def _attention_listener(states: Capture, layer: int) -> Callable[[AttentionState], None]:
    def listen(state: AttentionState) -> None:
        assert layer not in states.attention, f"block {layer} attends twice in one forward pass"
        states.attention[layer] = state

    return listen


def _output_hook(states: Capture, layer: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        states.hidden[layer] = output[0] if isinstance(output, tuple) else output

    return hook


def _input_hook(states: Capture) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.hidden[0] = args[0] if args else kwargs["hidden_states"]

    return hook
