"""One pass of a model over a micro-batch, padded or packed.

A packed row goes through embeddings and blocks as it is. After the last block its states are padded
again, for what stands above reads a sequence's first token, its last one, or all of its tokens, by
their places in a batch: poolers, classifiers, losses of sentences. So a model with a head is called
with padded ids and their mask, which its base model does not see, and what is captured of
embeddings and blocks is packed, what is captured above is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.blocks import capture_keywords, holder_of_blocks
from fastkd.capture.routing import hiding_nothing, is_routed
from fastkd.errors import UserError
from fastkd.packed_row import PackedRow
from fastkd.types import Inputs, model_inputs

_FIRST_POSITION: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Number of a sequence's first position, of models that were tried packed."""
_UNTYPED: WeakSet[nn.Module] = WeakSet()
"""Models that are given no token types."""


@contextmanager
def reading(model: PreTrainedModel, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """What to call a model with, while the context is open.

    Args:
        model: tried by `try_packed` where the inputs are packed.
        inputs: of a micro-batch, on the model's device.

    Yields:
        Its keyword arguments.
    """
    read, row = model_inputs(inputs), PackedRow.of(inputs)
    if model in _UNTYPED:
        read.pop("token_type_ids", None)
    if row is None:
        keywords = capture_keywords(model)
        if "use_cache" in keywords and is_routed(model) and "attention_mask" not in read:
            read["attention_mask"] = hiding_nothing(read["input_ids"])
        yield {**read, **keywords}
        return
    assert model in _FIRST_POSITION, "a model is tried before it reads packed rows"
    with reading_row(model, read, row, _FIRST_POSITION[model]) as packed:
        yield {**packed, **capture_keywords(model)}


@contextmanager
def reading_row(
    model: PreTrainedModel, read: Inputs, row: PackedRow, first: int
) -> Iterator[dict[str, Any]]:
    """Likewise, of a row.

    Args:
        model: whose attention takes rows, see `pack_attention`.
        read: `input_ids` and `position_ids`, which start at 0 with every sequence, and what else a
            model reads of tokens; [1, total].
        row: where the sequences stand.
        first: number of a sequence's first position in this model.

    Yields:
        What the model is called with. Where sequences begin is said in transformers' words for
        flash attention, and by the row for `packed_sdpa`.
    """
    ids, positions = read["input_ids"], read["position_ids"]
    keywords = {
        **read,
        "position_ids": positions + first if first else positions,
        "cu_seq_lens_q": row.starts,
        "cu_seq_lens_k": row.starts,
        "max_length_q": row.longest,
        "max_length_k": row.longest,
        "packed_row": row,
    }
    with ExitStack() as stack:
        handle = holder_of_blocks(model).register_forward_hook(_padding_hook(row))
        stack.callback(handle.remove)
        base = model.base_model
        if base is not model:
            hook = _packing_hook(ids)
            stack.callback(base.register_forward_pre_hook(hook, with_kwargs=True).remove)
            pad = getattr(model.config, "pad_token_id", None)
            keywords["input_ids"] = row.padded(ids, fill=0 if pad is None else max(pad, 0))
            keywords["attention_mask"] = row.mask
        yield keywords


def leave_types_out(model: PreTrainedModel) -> None:
    """Let a model read inputs without their token types, which it has no embeddings of."""
    _UNTYPED.add(model)


def reads_rows(model: PreTrainedModel) -> bool:
    """Whether a model was let read packed rows, in place of padded batches."""
    return model in _FIRST_POSITION


def note_first_position(model: PreTrainedModel, first: int) -> None:
    """Keep what trying a model showed."""
    _FIRST_POSITION[model] = first


def _packing_hook(ids: Tensor) -> Callable[..., Any]:
    """Lets a base model read the ids of the row in place of the padded ones."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # a head hands its ids on first, with or without their name
        given = {"attention_mask": None} if args else {"attention_mask": None, "input_ids": ids}
        return (ids, *args[1:]) if args else (), {**kwargs, **given}

    return hook


def _padding_hook(row: PackedRow) -> Callable[..., Any]:
    """Pads the states that the last block gives."""

    def hook(module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return row.padded(output)
        if isinstance(output, tuple):
            return (row.padded(output[0]), *output[1:])
        state = getattr(output, "last_hidden_state", None)
        if not isinstance(state, Tensor):
            raise UserError(
                f"{type(module).__name__} gives {type(output).__name__}, expected the states of "
                "its last block"
            )
        output.last_hidden_state = row.padded(state)
        return output

    return hook
