"""Attention of sequences that follow each other in one row: each sees its own tokens alone.

Flash attention reads where sequences begin from the keywords that transformers has for it. For
every other machine there is `packed_sdpa`, an attention function of transformers' interface that
calls `scaled_dot_product_attention` once for neighbours of equal length, which a batch that is
sorted by length has many of. The road not taken: transformers makes a mask of blocks for such a
row, [total, total], whose products are computed all the same.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fastkd.capture.routing import PREFIX, route_attention
from fastkd.errors import UserError
from fastkd.packed_row import PackedRow

PACKED_SDPA = "packed_sdpa"


def pack_attention(model: PreTrainedModel) -> None:
    """Let the attention of a model read packed rows.

    Raises:
        UserError: an implementation that does not know where a sequence ends.
    """
    running = model.config._attn_implementation
    plain = running.removeprefix(PREFIX)
    if "flash" in plain or plain == PACKED_SDPA:
        return
    if plain != "sdpa":
        raise UserError(
            f"{type(model).__name__} runs attention {plain}, which takes no packed sequences; set "
            "it to sdpa or flash_attention_2, or task.padding=buckets"
        )
    if PACKED_SDPA not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        # without a mask function of this name transformers makes no mask, for which it would look
        # at the positions of a decoder's row and wait for the device
        AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    model.config._attn_implementation = PACKED_SDPA
    if running != plain:
        route_attention(model)


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_row: PackedRow | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers has them, of a row.

    Args:
        module: which attends; says whether its attention is causal.
        query: [1, heads, total, head_dim].
        key, value: likewise, perhaps of fewer heads.
        attention_mask: of which a row has none.
        packed_row: where sequences begin and end.
        sliding_window: keys fewer than so many tokens away are seen.
        kwargs: those of transformers' sdpa.

    Returns:
        [1, total, heads, head_dim], and `None`.

    Raises:
        UserError: it is called on something else than a row.
    """
    if packed_row is None or attention_mask is not None:
        raise UserError(
            f"attention {PACKED_SDPA} reads packed rows alone, but was given "
            f"{'no row' if packed_row is None else 'a mask'}; set the model's attention to sdpa to "
            "read padded batches"
        )
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    runs = [(length, len(list(same))) for length, same in itertools.groupby(packed_row.lengths)]
    sizes = [length * number for length, number in runs]
    parts = [torch.split(tensor[0], sizes, dim=1) for tensor in (query, key, value)]
    outputs = []
    for (length, number), *states in zip(runs, *parts, strict=True):
        # [heads, number * length, head_dim] to [number, heads, length, head_dim]
        cut = [state.unflatten(1, (number, length)).transpose(0, 1) for state in states]
        window = _window(module, cut[0], sliding_window, kwargs)
        outputs.append(sdpa(module, *cut, window, **kwargs)[0].flatten(0, 1))
    return torch.cat(outputs)[None], None


def _window(
    module: nn.Module, query: Tensor, width: int | None, given: dict[str, Any]
) -> Tensor | None:
    """A mask of local attention, bool [tokens, tokens]; `None` where it hides nothing."""
    tokens = query.shape[2]
    if width is None or tokens <= width:
        return None
    position = torch.arange(tokens, device=query.device)
    distance = position - position[:, None]
    seen = distance.abs() < width
    flag = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if flag is None else flag
    return seen & (distance <= 0) if causal else seen
