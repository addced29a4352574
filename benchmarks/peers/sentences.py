"""The job of matching embeddings of sentences: mean square of vectors of length one, of mean-pooled
states, and an update. Both models have one width: where they differ, sentence-transformers projects
what it has scaled to length one, fastkd before. The teacher reads the tokens in every step."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize
from transformers import BertModel

# beside the inputs of the benchmarks
import benchmarks.inputs  # noqa: F401
import fastkd
from benchmarks.embedding_loop import embed
from benchmarks.peers.layers import make_pair
from benchmarks.peers.rows import LEARNING_RATE, Case, Step
from benchmarks.training_step import update

LOSS = "mse"


def fastkd_row(case: Case) -> Step:
    pair = make_pair(case, "sdpa")
    losses = {"embedding_output": {"kind": "mse", "pooling": "mean"}}
    distiller = fastkd.Distiller(pair.student, pair.teacher, losses)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=LEARNING_RATE, fused=True)
    # stays open: the process ends with the measurement
    distiller.__enter__()
    return Step(run=lambda: update(distiller(pair.inputs)[0], optimizer), optimizer=optimizer)


def plain_row(case: Case) -> Step:
    """A loop as people write it."""
    pair = make_pair(case, "sdpa")
    optimizer = pair.adam()

    def run() -> Tensor:
        with torch.no_grad():
            target = normalize(embed(pair.teacher, pair.inputs), dim=-1)
        made = normalize(embed(pair.student, pair.inputs), dim=-1)
        return update(mse_loss(made.float(), target.float()), optimizer)

    return Step(run=run, optimizer=optimizer, modules=(pair.teacher, pair.student))


def sentence_transformers_row(case: Case) -> Step:
    """sentence-transformers' `MSELoss`, on what its teacher gives of the same tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MSELoss

    pair = make_pair(case, "sdpa")
    inputs = pair.inputs
    teacher, student = (_modules(model, case) for model in (pair.teacher, pair.student))
    # the models were read again, and the step is to hold them once
    del pair
    assert isinstance(student, SentenceTransformer)
    module = MSELoss(student)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True)

    def run() -> Tensor:
        with torch.no_grad():
            target = teacher(dict(inputs))["sentence_embedding"]
        made: Tensor = module([dict(inputs)], target)
        return update(made, optimizer)

    return Step(run=run, optimizer=optimizer)


def _modules(model: BertModel, case: Case) -> Any:
    """Transformer, mean pooling and Normalize, as all-MiniLM-L6-v2 has them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from tiny_models import tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tiny_tokenizer(model.config.vocab_size).save_pretrained(folder)
        read = modules.Transformer(folder)
    width = model.config.hidden_size
    made = SentenceTransformer(
        modules=[read, modules.Pooling(width, "mean"), modules.Normalize()], device=case.device
    )
    return made.to(dtype=model.dtype)
