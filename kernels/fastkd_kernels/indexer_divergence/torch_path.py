"""The indexer's loss in plain PyTorch with linear memory: what the CPU runs.

One sweep over blocks of query rows against all keys that they see. The block's scores serve the
loss and its gradients at once, so nothing is made twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.divergences import row_divergence
from ..common.soft_cap import cap_scores

# the scores of one block of rows, over the heads of one product, take about this much
BLOCK_BYTES = 1 << 20


class Pair(NamedTuple):
    """One indexer and its teacher: query `[batch, index_heads, tokens, dim]`, key `[batch, 1,
    tokens, dim]`, weights `[batch, tokens, index_heads]`; the teacher's query, key, scale, cap, and
    sinks `[heads]` in the dtype of `accumulator`."""

    query: Tensor
    key: Tensor
    weights: Tensor
    teacher_query: Tensor
    teacher_key: Tensor
    teacher_scale: float
    teacher_softcap: float | None = None
    teacher_sinks: Tensor | None = None

    @property
    def student(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.weights

    @property
    def dtype(self) -> torch.dtype:
        """Type of sums."""
        return accumulator(*self[:5])


class Units(NamedTuple):
    """Stacked gradients of the sums for queries, keys and weights; empty if not made."""

    query: Tensor
    key: Tensor
    weights: Tensor


def forward(
    pairs: list[Pair],
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    causal: bool,
    need_grad: bool,
) -> tuple[Tensor, Units]:
    """Sums over the counted query rows `[pairs]`, and their gradients.

    `row_mask` are the counted query rows, bool `[batch, tokens]`.
    """
    first = pairs[0]
    sums = first.query.new_zeros(len(pairs), dtype=first.dtype)
    units = Units(*(sums.new_empty(0) for _ in range(3)))
    if need_grad:
        units = Units(*(sums.new_zeros((len(pairs), *of.shape)) for of in first.student))
    for index, pair in enumerate(pairs):
        for item in range(len(first.query)):
            masks = [None if mask is None else ~mask[item] for mask in (key_mask, row_mask)]
            outs = Units(*(of[index, item] for of in units)) if need_grad else None
            sums[index] += _sweep(pair, item, masks[0], masks[1], causal, outs)
    return sums, units


def _sweep(
    pair: Pair,
    item: int,
    hidden: Tensor | None,
    skipped: Tensor | None,
    causal: bool,
    outs: Units | None,
) -> Tensor:
    """The sum over one item's rows; fills `outs`, of which the key's is added to.

    `hidden` keys and `skipped` rows are bool `[tokens]`.
    """
    query, weights, teacher_query = (
        _zeroed(of[item].to(pair.dtype), skipped) for of in (pair.query, pair.weights, pair[3])
    )
    key, teacher_key = (_zeroed(of[item].to(pair.dtype), hidden) for of in (pair.key, pair[4]))
    tokens, dim = query.shape[1:]
    repeat = len(teacher_query) // len(teacher_key)
    of_row = max(len(query), repeat) * tokens * query.element_size()
    step = max(16, BLOCK_BYTES // of_row)
    low = torch.finfo(pair.dtype).min / 4
    total = query.new_zeros(())
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        last = stop if causal else tokens
        unseen = _unseen(hidden, start, stop, last, causal, query.device)
        target = _target_scores(pair, teacher_query[:, start:stop], teacher_key[:, :last], unseen)
        rows = query[:, start:stop].reshape(-1, dim)
        # [index_heads, rows, keys]
        positive = (rows @ key[0, :last].mT).view(len(query), stop - start, last).relu_()
        row_weights = weights[start:stop].mT[..., None]
        scores = (positive * row_weights).sum(0)
        for tile in (scores, target):
            tile.masked_fill_(unseen, low)
        values, slopes = row_divergence(scores, target, "kl")
        if skipped is not None:
            values = values.masked_fill(skipped[start:stop], 0.0)
        total += values.sum()
        if outs is None:
            continue
        # queries of skipped rows are 0, so slopes of theirs meet no product above 0
        # dL/dw = sum of dL/dI relu(q k)
        outs.weights[start:stop] = torch.linalg.vecdot(positive, slopes).mT
        # dL/d(q k) = w dL/dI where the product is positive
        made = positive.sign_().mul_(slopes).mul_(row_weights).view(-1, last)
        outs.query[:, start:stop] = (made @ key[0, :last]).view(len(query), -1, dim)
        outs.key[0, :last].addmm_(made.mT, rows)
    return total


def _zeroed(value: Tensor, masked: Tensor | None) -> Tensor:
    """`[tokens, width]` or `[heads, tokens, width]` with 0 at masked tokens."""
    return value if masked is None else value.masked_fill(masked[:, None], 0.0)


def _unseen(
    hidden: Tensor | None, start: int, stop: int, last: int, causal: bool, device: torch.device
) -> Tensor:
    """Which of the keys before `last` the rows from `start` to `stop` do not see."""
    unseen = torch.zeros(stop - start, last, dtype=torch.bool, device=device)
    if causal:
        unseen = torch.ones_like(unseen).triu_(start + 1)
    return unseen if hidden is None else unseen | hidden[:last]


def _target_scores(pair: Pair, query: Tensor, key: Tensor, unseen: Tensor) -> Tensor:
    """Log `[rows, keys]` of the attention probabilities summed over heads, up to a factor a row.

    `query` `[heads, rows, dim]` of all heads, `key` `[kv_heads, keys, dim]`. A sink makes a row's
    probabilities too small to be numbers where it takes nearly all: the largest share of a head's
    keys, so far, is taken off all of them.
    """
    rows, dim = query.shape[1:]
    repeat = len(query) // len(key)
    low = torch.finfo(query.dtype).min / 4
    total = query.new_zeros(unseen.shape)
    largest = query.new_full((rows, 1), -torch.inf)
    for group in range(len(key)):
        heads = slice(group * repeat, (group + 1) * repeat)
        scores = query[heads].reshape(-1, dim) @ key[group].mT
        scores = scores.mul_(pair.teacher_scale).view(repeat, rows, -1)
        if pair.teacher_softcap is not None:
            cap_scores(scores, pair.teacher_softcap, need_slope=False)
        scores.masked_fill_(unseen, low)
        if pair.teacher_sinks is None:
            total += scores.softmax(-1).sum(0)
            continue
        over = pair.teacher_sinks[heads, None, None] - scores.logsumexp(-1, keepdim=True)
        # log of the part of a head's probability that its keys hold
        share = -torch.nn.functional.softplus(over, threshold=40.0)
        larger = torch.maximum(largest, share.amax(0))
        total *= (largest - larger).exp()
        total += scores.softmax(-1).mul_((share - larger).exp()).sum(0)
        largest = larger
    return total.clamp_(min=torch.finfo(total.dtype).tiny).log_()
