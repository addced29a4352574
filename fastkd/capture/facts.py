"""Facts of a model that its configuration doesn't say: tokens it has room for, and what it sees.

Others ask for them alone, without a trial. `trial_inputs` is what a model is run on to find out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.blocks import capture_keywords, find_blocks
from fastkd.capture.modes import evaluating
from fastkd.capture.recording import capture
from fastkd.capture.routing import runnable
from fastkd.errors import UserError


def usable_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text that a model has positions for, `None` where none are counted."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # models without a limit may say -1
    if not isinstance(positions, int) or positions <= 0:
        return None
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        table = getattr(module, "position_embeddings", None)
        if isinstance(padding, int) and isinstance(table, nn.Embedding):
            # RoBERTa and its kin count from the place behind padding's
            return positions - padding - 1
    return positions


def vocabulary_size(model: PreTrainedModel) -> int:
    """Tokens that a model embeds.

    Raises:
        UserError: it has no table of embeddings.
    """
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor):
        raise UserError(
            f"{type(model).__name__} has no table of token embeddings; give a model of tokens"
        )
    return int(weight.shape[0])


def sees_ahead(model: PreTrainedModel) -> bool:
    """Whether a model's first token sees the ones behind it; of one that reads tokens."""
    first = trial_inputs(model, 4)["input_ids"][0]
    changed = first.clone()
    changed[-1] = first[first != first[-1]][0]
    states = []
    with evaluating(model), torch.no_grad(), runnable(model):
        for ids in (first, changed):
            with capture(model, outputs=True) as seen:
                model(input_ids=ids[None], **capture_keywords(model))
            assert seen.outputs is not None, "it was captured"
            states.append(seen.outputs[0, 0])
    return not torch.equal(*states)


def hands_on_last_block(model: PreTrainedModel) -> bool:
    """Whether a model's output is the state of its last block, with no norm behind it; of one whose
    blocks can be captured."""
    depth = len(find_blocks(model))
    recorded = capture(model, hidden={depth}, outputs=True)
    with evaluating(model), torch.no_grad(), runnable(model), padded(model), recorded as states:
        model(**trial_inputs(model, 4), **capture_keywords(model))
    return states.outputs is not None and torch.equal(states.outputs, states.hidden[depth])


def trial_inputs(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """Two sequences, of which the second is half padding; of a vision model two images."""
    config, name = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (2, getattr(config, "num_channels", 3), height, width)
        images = torch.randn(shape, generator=generator)
        return {"pixel_values": images.to(model.device, model.dtype)}
    if model.main_input_name != "input_ids":
        raise UserError(
            f"{name} reads {model.main_input_name}, expected a model of tokens or images of one "
            "size; give one of those"
        )
    # any id but the padding, whose positions some models don't count
    known = torch.arange(vocabulary_size(model))
    pad = getattr(config, "pad_token_id", None)
    pad = None if pad == -1 else pad
    known = known[known != (-1 if pad is None else pad)]
    ids = known[torch.randint(len(known), (2, tokens), generator=generator)]
    mask = torch.ones_like(ids)
    mask[1, (tokens + 1) // 2 :] = 0
    if pad is not None:
        ids[mask == 0] = pad
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


@contextmanager
def padded(model: PreTrainedModel) -> Iterator[None]:
    """A decoder's classifier that knows of no padding reads one sequence at a time."""
    config: Any = model.config
    unset = getattr(config, "pad_token_id", 0) is None
    if unset:
        config.pad_token_id = -1
    try:
        yield
    finally:
        if unset:
            config.pad_token_id = None
