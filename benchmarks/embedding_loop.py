"""The peer of `embeddings.py`: a plain loop that distils sentence embeddings, without fastkd."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel

LONGEST = 32


def embed(model: nn.Module, batch: BatchEncoding) -> Tensor:
    """Mean of the last hidden states of the tokens that are no padding, [texts, width]."""
    mask = batch["attention_mask"].unsqueeze(-1)
    return (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)


def truncated(path: str, layers: tuple[int, ...]) -> PreTrainedModel:
    """A BERT with some of its blocks alone (counted from 1), without dropout."""
    model = AutoModel.from_pretrained(path)
    model.encoder.layer = nn.ModuleList(model.encoder.layer[layer - 1] for layer in layers)
    model.config.num_hidden_layers = len(layers)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batches(texts: list[str], size: int) -> Iterator[list[str]]:
    """Texts of similar length, in an order that is drawn, without end."""
    while True:
        random.shuffle(texts)
        for start in range(0, len(texts) - 32 * size + 1, 32 * size):
            window = sorted(texts[start : start + 32 * size], key=len)
            groups = [window[at : at + size] for at in range(0, len(window), size)]
            random.shuffle(groups)
            yield from groups


def distil(path: str, texts: list[str], steps: int, *, size: int, rate: float, seed: int) -> Loop:
    """A loop that is ready for its first step."""
    torch.manual_seed(seed)
    random.seed(seed)
    return Loop(path, list(texts), steps, size, rate)


class Loop:
    """Thirty lines as many people write them: 1 - cosine of embeddings, AdamW, a linear rate."""

    def __init__(self, path: str, texts: list[str], steps: int, size: int, rate: float) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.teacher = AutoModel.from_pretrained(path).eval().requires_grad_(False)
        self.student = truncated(path, (2, 4, 6))
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=rate, weight_decay=0.01)
        warmup = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, (steps - step) / steps)
        )
        self.batches = batches(texts, size)

    def step(self) -> None:
        batch = self.tokenizer(
            next(self.batches),
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        with torch.no_grad():
            target = embed(self.teacher, batch)
        loss = (1 - cosine_similarity(embed(self.student, batch), target)).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def save(self, folder: Path) -> None:
        self.student.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
