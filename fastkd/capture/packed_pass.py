"""One pass of a model over a micro-batch, padded or packed.

A packed row goes through embeddings and blocks as it is. After the last block its states are padded
again, for what stands above reads a sequence's first token, or all of its tokens, by their places
in a batch: poolers, classifiers, losses of sentences. So what is captured of embeddings and blocks
is packed, what is captured above is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.blocks import holder_of_blocks, no_cache
from fastkd.errors import UserError
from fastkd.packed_row import PackedRow
from fastkd.types import LENGTHS, ROWS, STARTS, Inputs

_NOT_READ = frozenset({"labels", ROWS, LENGTHS, STARTS})
_FIRST_POSITION: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Of models that were tried packed, the number of a sequence's first position."""


@contextmanager
def reading(model: PreTrainedModel, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """What to call a model with, while the context is open.

    Args:
        model: tried by `try_packed` where the inputs are packed.
        inputs: of a micro-batch, on the model's device.

    Yields:
        Its keyword arguments; labels are left out, of which it would compute a loss of its own.
    """
    read = {name: tensor for name, tensor in inputs.items() if name not in _NOT_READ}
    row = PackedRow.of(inputs)
    if row is None:
        yield {**read, **no_cache(model)}
        return
    assert model in _FIRST_POSITION, "a model is tried before it reads packed rows"
    with padded_above(model, row):
        yield {**read, **no_cache(model), **packed_keywords(inputs, row, _FIRST_POSITION[model])}


def packed_keywords(inputs: Inputs, row: PackedRow, first: int) -> dict[str, Any]:
    """What says where sequences begin: in transformers' words for flash attention, and as the row
    for `packed_sdpa`.

    Args:
        inputs: whose `position_ids` start at 0 with every sequence.
        row: of the inputs.
        first: number of a sequence's first position.
    """
    positions = inputs["position_ids"]
    return {
        "position_ids": positions + first if first else positions,
        "cu_seq_lens_q": row.starts,
        "cu_seq_lens_k": row.starts,
        "max_length_q": row.longest,
        "max_length_k": row.longest,
        "packed_row": row,
    }


def note_first_position(model: PreTrainedModel, first: int) -> None:
    """Keep what trying a model showed."""
    _FIRST_POSITION[model] = first


@contextmanager
def padded_above(model: PreTrainedModel, row: PackedRow) -> Iterator[None]:
    """Let a model pad the states that its last block gives while the context is open."""

    def hook(module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return row.padded(output)
        if isinstance(output, tuple):
            return (row.padded(output[0]), *output[1:])
        state = getattr(output, "last_hidden_state", None)
        if not isinstance(state, Tensor):
            raise UserError(
                f"{type(model).__name__}: {type(module).__name__} gives {type(output).__name__}, "
                "expected the states of its last block"
            )
        output.last_hidden_state = row.padded(state)
        return output

    handle = holder_of_blocks(model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
