"""A model that computes in bf16, as transformers would have loaded it in that precision."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from fastkd.errors import UserError


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
    twin = _in_half(model)
    half = {name for name, buffer in twin.named_buffers() if buffer.dtype == torch.bfloat16}
    for name, buffer in model.named_buffers():
        if name in half and not _stays_whole(model, name):
            buffer.data = buffer.data.to(torch.bfloat16)


def kept_whole(model: PreTrainedModel) -> str | None:
    """Which parameters of a model transformers keeps in fp32, in words: those that a model names,
    or makes so; `None` where it keeps none, and all may be bf16."""
    made = {
        name
        for name, parameter in _in_half(model).named_parameters()
        if parameter.dtype != torch.bfloat16
    }
    names = [name for name, _ in model.named_parameters()]
    whole = [name for name in names if name in made or _stays_whole(model, name)]
    if not whole:
        return None
    return f"{type(model).__name__} keeps {whole[0]} in fp32, of {len(whole)} parameters"


def check_rounding(model: PreTrainedModel) -> None:
    """See that all parameters of a model may be bf16.

    Raises:
        UserError: transformers keeps some in fp32, see `kept_whole`.
    """
    whole = kept_whole(model)
    if whole is not None:
        raise UserError(f"train.precision is bf16, but {whole}; set train.precision to fp32")


def _in_half(model: PreTrainedModel) -> PreTrainedModel:
    """Its like, without numbers, of the precisions in which transformers makes it in bf16."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)


def _stays_whole(model: PreTrainedModel, name: str) -> bool:
    """Whether a model names it, or a module that it is in, as what stays in fp32."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(f".{part}." in f".{name}." for part in kept)
