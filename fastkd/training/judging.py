"""What a model's embeddings are worth: Spearman's correlation with scores of people, and MTEB."""

from __future__ import annotations

from typing import Any

import torch

from fastkd.data.rows.tokenized import EncodedRows
from fastkd.data.sampler import evaluation_parts
from fastkd.data.tasks.metrics import measure
from fastkd.training.setup import Run
from fastkd.types import Side


def judge_embeddings(run: Run, side: Side) -> dict[str, Any]:
    """Score a model's embeddings on everything that a recipe names; collective over the ranks.

    Returns:
        `pairs` by name, where there are some; empty where a recipe names nothing.

    Raises:
        UserError: the model's embeddings can't be made.
    """
    if not run.pairs:
        return {}
    return {"pairs": {name: correlation(run, side, pairs) for name, pairs in run.pairs.items()}}


def correlation(run: Run, side: Side, pairs: EncodedRows) -> float:
    """Spearman's correlation of the cosines of pairs with their scores; each text is read once, by
    one rank."""
    ranks, lengths = run.ranks, pairs.lengths
    assert pairs.scores is not None, "pairs have scores"
    cosines = torch.zeros(len(pairs), dtype=torch.float64, device=ranks.device)
    # two texts a pair
    size = max(1, run.plan.micro_batch_size // 2)
    for counted, rows in evaluation_parts(
        lengths, size, rank=ranks.rank, world_size=ranks.world_size
    ):
        embeddings = run.embed(side, run.move(pairs.batch(rows))).double()
        found = torch.nn.functional.cosine_similarity(embeddings[::2], embeddings[1::2], dim=-1)
        cosines[counted.to(found.device)] = found[: len(counted)]
    # every pair was written by one rank
    found = ranks.sum(cosines).cpu()
    return measure(["spearman"], found, pairs.scores[:, 0])["spearman"]
