"""What the losses of a step are means over, counted so that cutting a step changes nothing.

A loss here is a mean over valid query-key pairs, tokens, examples or labels of the *whole*
optimiser step. One micro-batch of one rank holds a part of those, so its means are scaled by that
part: the sum over micro-batches and ranks is then the same however the step is cut, and padding
changes nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastkd.head_spec import HEADS
from fastkd.packed_row import PackedRow
from fastkd.types import IGNORE_INDEX, LABEL_WEIGHTS, Head, Inputs

Reduction = Literal["valid", "tinybert"]
Divisor = Literal["pairs", "tokens", "rows", "examples", "labels", "predictions"]

DIVISORS: tuple[Divisor, ...] = ("pairs", "tokens", "rows", "examples", "labels", "predictions")


def count_divisors(
    inputs: Inputs,
    causal: bool,
    reduction: Reduction,
    labels: Tensor | None = None,
    *,
    told: bool = False,
) -> Tensor:
    """What a micro-batch contributes to the divisors of a step.

    Args:
        inputs: `input_ids` [batch, tokens] and, if padded, `attention_mask` of the same shape; or
            a packed row, in which no padding counts.
        causal: whether queries see earlier keys only.
        reduction: whether padding counts in pairs and tokens.
        labels: from `target_labels`; one a token, or one an example.
        told: from `tells_predictions`.

    Returns:
        fp64 [6] on the inputs' device, in the order of `DIVISORS`: query-key pairs, tokens, valid
        rows (tokens that are no padding, whatever the reduction), examples, labels, or the sum of
        their weights where the inputs have those, and predictions of a language model, which are
        the labels where the batch tells them and else the valid rows.
    """
    row, weights = PackedRow.of(inputs), inputs.get(LABEL_WEIGHTS)
    if row is not None:
        return _count_row(row, causal, labels, weights, told)
    ids = inputs["input_ids"]
    given = inputs.get("attention_mask")
    ones = torch.ones_like(ids, dtype=torch.float64)
    # any number but 0 is a token, as models read it
    rows = ones if given is None else (given != 0).to(torch.float64)
    valid = rows if reduction == "valid" else ones
    visible = causal and reduction == "valid"
    keys = valid.cumsum(dim=1) if visible else valid.sum(dim=1, keepdim=True)
    labelled = _labelled(labels, weights, ones)
    # of the size of the batch, without a copy from the host
    examples = ones[:, 0].sum()
    whole = rows.sum()
    predicted = labelled if told else whole
    return torch.stack([(valid * keys).sum(), valid.sum(), whole, examples, labelled, predicted])


def _count_row(
    row: PackedRow, causal: bool, labels: Tensor | None, weights: Tensor | None, told: bool
) -> Tensor:
    sizes = row.starts.diff().double()
    keys = (sizes + 1) / 2 if causal else sizes
    tokens, examples = sizes.sum(), torch.ones_like(sizes).sum()
    labelled = _labelled(labels, weights, sizes)
    predicted = labelled if told else tokens
    return torch.stack([(sizes * keys).sum(), tokens, tokens, examples, labelled, predicted])


def _labelled(labels: Tensor | None, weights: Tensor | None, like: Tensor) -> Tensor:
    if labels is None:
        return like.new_zeros(())
    counted = (labels != IGNORE_INDEX).double()
    return counted.sum() if weights is None else (counted * weights).sum()


def tells_predictions(inputs: Inputs, head: Head) -> bool:
    """Whether a batch says which next tokens count, as a chat does of its answers."""
    return HEADS[head].labels == "next_token" and "labels" in inputs


def target_labels(inputs: Inputs, head: Head) -> Tensor | None:
    """The labels that a head is to predict, `IGNORE_INDEX` where there is none, and at padding.

    Returns:
        For a causal language model the next token, [batch, tokens] int64, from `labels` of the
        inputs where they are given; else those labels, one an example or one a token, or `None`.
    """
    of, labels, mask = HEADS[head].labels, inputs.get("labels"), inputs.get("attention_mask")
    if of == "next_token":
        labels = inputs["input_ids"] if labels is None else labels
        following = labels[:, 1:]
        if mask is not None:
            following = following.masked_fill(mask[:, 1:] == 0, IGNORE_INDEX)
        labels = torch.nn.functional.pad(following, (0, 1), value=IGNORE_INDEX)
    elif labels is None or of not in ("token", "masked_token"):
        return labels
    # what padding on the left predicts is no prediction either
    return labels if mask is None else labels.masked_fill(mask == 0, IGNORE_INDEX)
