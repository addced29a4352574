"""Perplexity of a language model on held-out tokens, beside its losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.capture.token_loss import TokenLoss, heard_token_loss
from fastkd.distributed import Ranks
from fastkd.head_spec import HEADS
from fastkd.losses.objective import Objective
from fastkd.types import Head


def perplexity_name(objective: Objective) -> str | None:
    """What an evaluation calls the perplexity of a run's models; `None` where it finds none."""
    spec = HEADS[objective.pair.head]
    # tokens are masked where a loss asks for them
    masked = any(match.divisor == "labels" for match in objective.matches)
    if not spec.language_model or not (spec.labels == "next_token" or masked):
        return None
    return _name(objective.pair.head)


def _name(head: Head) -> str:
    # of a masked token the model has seen both sides, so it is no perplexity of the text
    return "pseudo_perplexity" if HEADS[head].labels == "masked_token" else "perplexity"


class Perplexity:
    """`exp` of the mean cross-entropy of the labels of a language model; nothing of other heads."""

    def __init__(self, head: Head, heard: TokenLoss | None) -> None:
        self._heard = heard
        self._head = head

    def expect(self, labels: Tensor | None) -> None:
        """Say before a pass what it is to predict, see `target_labels`; `None` counts nowhere."""
        if self._heard is not None:
            self._heard.labels = labels

    def results(self, ranks: Ranks) -> dict[str, float]:
        """By name, over all passes of all ranks; empty where nothing had a label."""
        if self._heard is None:
            return {}
        total, count = ranks.sum(torch.stack([self._heard.sum, self._heard.count]))
        return {_name(self._head): (total / count).exp().item()} if count else {}


@contextmanager
def heard_perplexity(
    model: PreTrainedModel, head: Head, device: torch.device
) -> Iterator[Perplexity]:
    """Listen to what a model predicts while the context is open."""
    if not HEADS[head].language_model:
        yield Perplexity(head, None)
        return
    with heard_token_loss(model, device) as heard:
        yield Perplexity(head, heard)
