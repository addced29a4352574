"""The job of TinyBERT's losses: attention, hidden states and embeddings, and an update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertModel

import fastkd
from benchmarks.peers.rows import LEARNING_RATE, Case, Step
from benchmarks.training_step import (
    BERT_BASE,
    TINY,
    Inputs,
    Size,
    bert_config,
    dtype_on,
    make_inputs,
    update,
)

MINILM = Size(teacher=(6, 384, 1536), student=(3, 384, 1536))
SIZES = {
    "BERT-base to 4 x 312": BERT_BASE,
    "MiniLM-L6 to 3 layers": MINILM,
    "tiny": TINY,
    "tiny, one width": Size(teacher=(4, 32, 64), student=(2, 32, 64), heads=4),
}
SCORES, PROBABILITIES = "scores", "probabilities"
# of attention, so that it counts about as much as the states: else any would do
WEIGHTS = {SCORES: 1.0, PROBABILITIES: 100.0}
WORDS = 30522


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both models with the weights that every row starts from, and what is compared."""

    inputs: Inputs
    teacher: BertModel
    student: BertModel
    heads: int
    links: tuple[tuple[int, int], ...]
    """Blocks of student and teacher, from 1."""
    projections: nn.ModuleList
    """One for each link, then that of the embeddings; empty where widths agree."""

    @property
    def mask(self) -> Tensor:
        return self.inputs["attention_mask"].bool()

    @property
    def states(self) -> tuple[tuple[int, int], ...]:
        """Layers whose states are compared, in the order of the projections."""
        return (*self.links, (0, 0))

    def weight_of_mean(self, loss: str) -> float:
        """Of attention, where its mean is taken over all pairs of tokens that are no padding: of
        probabilities fastkd adds up a row's squared differences and takes the mean over rows."""
        if loss == SCORES:
            return WEIGHTS[loss]
        lengths = self.mask.sum(dim=1)
        return WEIGHTS[loss] * float(lengths.square().sum() / lengths.sum())

    def adam(self) -> torch.optim.Optimizer:
        own = [*self.student.parameters(), *self.projections.parameters()]
        return torch.optim.AdamW(own, lr=LEARNING_RATE, fused=True)


def make_pair(case: Case, attention: str) -> Pair:
    """The same weights whatever the attention: `sdpa`, or `eager`, which makes maps."""
    size = SIZES[case.size]
    words = 512 if case.size.startswith("tiny") else WORDS
    torch.manual_seed(0)
    models = []
    for shape in (size.teacher, size.student):
        config = bert_config(shape, size.heads, words, max(512, case.tokens))
        config._attn_implementation = attention
        # scores then deviate by 1: with the usual 0.02 attention is the same everywhere
        config.initializer_range = shape[1] ** -0.5
        model = BertModel(config, add_pooling_layer=False)
        models.append(model.to(case.device, dtype_on(case.device)))
    teacher, student = models
    depths, widths = (size.student[0], size.teacher[0]), (size.student[1], size.teacher[1])
    links = tuple((s, s * depths[1] // depths[0]) for s in range(1, depths[0] + 1))
    count = len(links) + 1 if widths[0] != widths[1] else 0
    projections = nn.ModuleList(nn.Linear(*widths) for _ in range(count))
    return Pair(
        inputs=make_inputs(case.batch, case.tokens, case.device, padded=True, words=words),
        teacher=teacher.eval().requires_grad_(False),
        student=student,
        heads=size.heads,
        links=links,
        projections=projections.to(case.device, dtype_on(case.device)),
    )


def attention_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """[batch, heads, tokens, tokens] of what the layers of queries and keys give."""
    query, key = (of.unflatten(-1, (heads, -1)).transpose(1, 2) for of in (query, key))
    return query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5


def mean_of_pairs(difference: Tensor, mask: Tensor) -> Tensor:
    """Mean square over heads and pairs of tokens that are no padding."""
    counted = mask[:, None, :, None] & mask[:, None, None, :]
    squares = torch.where(counted, difference.float().square(), 0.0)
    return squares.sum() / (counted.sum() * difference.shape[1])


def mean_of_tokens(difference: Tensor, mask: Tensor) -> Tensor:
    """Mean square over the numbers of all tokens that are no padding."""
    counted = mask[:, :, None]
    squares = torch.where(counted, difference.float().square(), 0.0)
    return squares.sum() / (counted.sum() * difference.shape[2])


def fastkd_row(case: Case, loss: str) -> Step:
    """fastkd's `Distiller` in a loop."""
    pair = make_pair(case, "sdpa")
    kind = "score_mse" if loss == SCORES else "mse"
    projection = "per_pair" if len(pair.projections) else "none"
    distiller = fastkd.Distiller(
        pair.student,
        pair.teacher,
        {
            "attention": {"kind": kind, "weight": WEIGHTS[loss]},
            "hidden": {"projection": projection},
            "embedding": {"projection": projection},
        },
    )
    weights = dict(distiller.objective.named_parameters())
    assert len(weights) == 2 * len(pair.projections), list(weights)
    with torch.no_grad():
        for number, linear in enumerate(pair.projections):
            for kind, value in linear.named_parameters():
                (name,) = (n for n in weights if n.endswith(f".{kind}_{number}"))
                weights[name].copy_(value)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=LEARNING_RATE, fused=True)
    # stays open: the process ends with the measurement
    distiller.__enter__()
    return Step(run=lambda: update(distiller(pair.inputs)[0], optimizer), optimizer=optimizer)


def plain_row(case: Case, loss: str) -> Step:
    """A loop as people write it: maps of attention by `output_attentions`, or scores of queries and
    keys that hooks take from their layers."""
    asked = {"output_hidden_states": True, "output_attentions": loss == PROBABILITIES}
    pair = make_pair(case, "eager" if loss == PROBABILITIES else "sdpa")
    optimizer, weight = pair.adam(), pair.weight_of_mean(loss)
    ends = tuple(zip(*pair.links, strict=True))
    heard: tuple[dict[int, Tensor], ...] = ({}, {})
    if loss == SCORES:
        for model, blocks, found in zip((pair.student, pair.teacher), ends, heard, strict=True):
            _listen(model, blocks, pair.heads, found)

    def run() -> Tensor:
        with torch.no_grad():
            taught = pair.teacher(**pair.inputs, **asked)
        made = pair.student(**pair.inputs, **asked)
        total = torch.zeros((), device=case.device)
        for s, t in pair.links:
            if loss == PROBABILITIES:
                difference = made.attentions[s - 1] - taught.attentions[t - 1]
            else:
                difference = heard[0].pop(s) - heard[1].pop(t)
            total = total + weight * mean_of_pairs(difference, pair.mask)
        for number, (s, t) in enumerate(pair.states):
            state = made.hidden_states[s]
            if len(pair.projections):
                state = pair.projections[number](state)
            total = total + mean_of_tokens(state - taught.hidden_states[t], pair.mask)
        return update(total, optimizer)

    return Step(
        run=run, optimizer=optimizer, modules=(pair.teacher, pair.student, pair.projections)
    )


def _listen(model: BertModel, blocks: Iterable[int], heads: int, found: dict[int, Tensor]) -> None:
    """Let the scores of some blocks be found after a forward."""

    def hook(block: int) -> Callable[..., None]:
        attention = model.encoder.layer[block - 1].attention.self
        queries: list[Tensor] = []
        attention.query.register_forward_hook(lambda _m, _i, out: queries.append(out))

        def of_key(_module: nn.Module, _inputs: object, key: Tensor) -> None:
            found[block] = attention_scores(queries.pop(), key, heads)

        return attention.key.register_forward_hook(of_key)

    for block in blocks:
        hook(block)
