"""What a model is run on to find out what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.errors import UserError


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
