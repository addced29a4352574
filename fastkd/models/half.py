"""A model that computes in bf16, as transformers would have loaded it in that precision."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def round_parameters(module: nn.Module) -> None:
    """Let all parameters of a module be bf16, and its buffers what they are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def round_buffers(model: PreTrainedModel) -> None:
    """Let those buffers of a model be bf16 that transformers has in bf16 where it loads one.

    That leaves the frequencies of rotary embeddings as they are, which at long distances turn by
    other angles once they are rounded, and what a model names that must stay fp32; and a few models
    multiply others with their states as they stand, which then must be of one precision.
    """
    with torch.device("meta"):
        twin = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
    half = {name for name, buffer in twin.named_buffers() if buffer.dtype == torch.bfloat16}
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, buffer in model.named_buffers():
        # a name of a module, or of several in a row
        stays = any(f".{part}." in f".{name}." for part in kept)
        if name in half and not stays:
            buffer.data = buffer.data.to(torch.bfloat16)
