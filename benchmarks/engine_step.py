"""A training step as `fastkd distill` makes it: its feed, its engine, its sums of losses."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertModel

# the helpers of the tests, beside the inputs of the benchmarks
import benchmarks.inputs  # noqa: F401
from benchmarks.training_step import BERT_BASE, Size, Step, bert_config
from fastkd.data.prefetch import Prefetched
from fastkd.distributed import joined_ranks
from fastkd.recipe import Recipe, parse_recipe
from fastkd.training.graphs import Record
from fastkd.training.loop import read_step, train_step
from fastkd.training.setup import graphed_step, set_up
from fastkd.training.window import Window

BLOCKS = 64
ZERO: dict[str, Any] = {"wall_clock_breakdown": False}
"""A section that asks for nothing but DeepSpeed's engine."""


@contextmanager
def engine_step(
    batch: int,
    tokens: int,
    deepspeed: dict[str, Any] | None = None,
    size: Size = BERT_BASE,
    words: int = 30000,
    record: Record | None = None,
) -> Iterator[Step]:
    """A step of a run that is set up from a recipe; on the GPU where there is one.

    Args:
        batch: blocks of a step.
        tokens: of a block.
        deepspeed: section of the recipe.
        size: of both models.
        words: of their vocabulary.
        record: what records forward and backward in the place of a CUDA graph; eager where not
            given.

    Yields:
        What makes the next step of the run, and gives its weighted loss.
    """
    with tempfile.TemporaryDirectory() as folder, joined_ranks() as ranks:
        recipe = make_recipe(Path(folder), batch, tokens, size, words, deepspeed or {})
        run = set_up(recipe, ranks, progress=False)
        if record is not None:
            run.graphed = graphed_step(run, record)
        numbers = itertools.count()
        with closing(Prefetched(run.micro_batches(), ranks.device)) as micro_batches:
            window = Window(run, micro_batches, 0)

            def step() -> Tensor:
                number = next(numbers)
                losses = train_step(run, read_step(run, micro_batches, number))
                window.add(losses)
                return losses[1].sum()

            yield step


def make_recipe(
    folder: Path, batch: int, tokens: int, size: Size, words: int, deepspeed: dict[str, Any]
) -> Recipe:
    """A teacher of random weights, a text of random words, and TinyBERT's losses on them."""
    from tiny_models import tiny_tokenizer

    torch.manual_seed(0)
    teacher = folder / "teacher"
    BertModel(bert_config(size.teacher, size.heads, words)).save_pretrained(teacher)
    tiny_tokenizer(words).save_pretrained(teacher)
    ids = torch.randint(words // 30, words, (BLOCKS, tokens)).tolist()
    text = folder / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in ids), encoding="utf-8")
    layers, width, inner = size.student
    return parse_recipe(
        {
            "teacher": {"model": str(teacher)},
            "student": {"layers": layers, "hidden_size": width, "intermediate_size": inner},
            "losses": {"attention": {}, "hidden": {}, "embedding": {}},
            "data": {"train": str(text), "block_size": tokens, "cache": str(folder / "cache")},
            "train": {"batch_size": batch, "warmup_steps": 100},
            "run": {"output": str(folder / "run")},
            "deepspeed": deepspeed,
        }
    )
