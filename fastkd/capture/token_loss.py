"""How well a language model predicts labels, heard in passes that are made anyway.

The layer that makes the logits is listened to. From its input log-probabilities of the labels are
made over a part of the vocabulary at a time, so that `[tokens, vocabulary]` is never stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.finish import Finish
from fastkd.capture.lm_head import finish_of, last_layer
from fastkd.types import IGNORE_INDEX

# logits that are stored at once
_LOGITS = 1 << 24


class TokenLoss:
    """Cross-entropy of the labels of several passes.

    Set `labels` before each pass: [batch, tokens] int64, `IGNORE_INDEX` where nothing counts.
    """

    def __init__(self, device: torch.device, finish: Finish) -> None:
        self._finish = finish
        self.labels: Tensor | None = None
        self.sum = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def hear(self, layer: nn.Linear, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook of the layer that makes the logits."""
        if self.labels is None:
            return
        counted = self.labels != IGNORE_INDEX
        hidden, labels = arguments[0][counted], self.labels[counted]
        found = label_losses(hidden, layer.weight, layer.bias, labels, self._finish)
        self.sum += found.double().sum()
        self.count += counted.sum()


@contextmanager
def heard_token_loss(model: PreTrainedModel, device: torch.device) -> Iterator[TokenLoss]:
    """Listen to a language model while the context is open."""
    layer, heard = last_layer(model), TokenLoss(device, finish_of(model))
    assert layer is not None, "the model has a language model's head"
    handle = layer.register_forward_pre_hook(heard.hear)
    try:
        yield heard
    finally:
        handle.remove()


def label_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, finish: Finish
) -> Tensor:
    """Negative log-probability of each label, fp32 or better.

    Args:
        hidden: [tokens, width], what the head multiplies.
        weight: [vocabulary, width].
        bias: [vocabulary].
        labels: [tokens] int64, each a row of `weight`.
        finish: what the model makes of its last layer's output.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(wide)
    size = max(1, _LOGITS // max(1, len(hidden)))
    normaliser = hidden.new_full(labels.shape, -torch.inf)
    chosen = hidden.new_zeros(labels.shape)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(weight), size):
            rows = slice(start, start + size)
            part = None if bias is None else bias[rows].to(wide)
            logits = finish.of(nn.functional.linear(hidden, weight[rows].to(wide), part))
            normaliser = torch.logaddexp(normaliser, logits.logsumexp(dim=-1))
            place = labels - start
            inside = (place >= 0) & (place < logits.shape[-1])
            picked = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1).unsqueeze(-1))
            chosen += picked.squeeze(-1) * inside
    return normaliser - chosen
