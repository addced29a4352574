"""What each seed of a recipe's `train` draws, and that it draws nothing else."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from tiny_runs import make_recipe
from torch import Tensor
from transformers import AutoModelForMaskedLM

from fastkd.distributed import Ranks
from fastkd.recipe import load_recipe
from fastkd.training.setup import set_up
from fastkd.types import IGNORE_INDEX

# the others, where `train.seed` alone is to change
KEPT = ["train.order_seed=0", "train.dropout_seed=0"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    student, losses = {"head": "masked_lm", "init": "random"}, {"mlm": {}, "logits": {}}
    recipe = make_recipe(folder, student=student, losses=losses)
    model = AutoModelForMaskedLM.from_config(tiny_config("bert"))
    model.save_pretrained(folder / "teacher")
    return recipe


def drawn(path: Path, ranks: Ranks, *overrides: str) -> dict[str, Tensor]:
    """The student's weights, what its first step reads with tokens that are hidden, and the state
    of the generator of its dropout."""
    run = set_up(load_recipe(path, overrides), ranks, progress=False)
    dropout = torch.get_rng_state()
    with closing(run.micro_batches()) as micro_batches:
        (batch,) = micro_batches.next_step(0)
    hidden = batch["labels"] != IGNORE_INDEX
    blocks = torch.where(hidden, batch["labels"], batch["input_ids"])
    weights = torch.cat([p.detach().flatten() for p in run.module.student.parameters()])
    return {"weights": weights, "blocks": blocks, "hidden": hidden, "dropout": dropout}


@pytest.fixture(scope="module")
def base(path: Path, ranks: Ranks) -> dict[str, Tensor]:
    return drawn(path, ranks, "train.seed=0")


@pytest.mark.parametrize(
    ("overrides", "others"),
    [
        (["train.seed=1"], {"weights", "blocks", "hidden", "dropout"}),
        (["train.seed=1", *KEPT], {"weights"}),
        (["train.order_seed=1"], {"blocks", "hidden"}),
        (["train.dropout_seed=1"], {"dropout"}),
    ],
)
def test_a_seed_draws_what_is_its_own(
    path: Path, ranks: Ranks, base: dict[str, Tensor], overrides: list[str], others: set[str]
) -> None:
    found = drawn(path, ranks, *overrides)
    assert {name for name, values in found.items() if not torch.equal(values, base[name])} == others
