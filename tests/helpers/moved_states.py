"""Load a checkpoint into engines of several layouts, and save each anew without making a step.

Used as `python moved_states.py recipe.yaml FOLDER '[["train.zero_stage=2", ...], ...]'`, also under
torchrun: the newest checkpoint of `run.output` is loaded, and one is written to a folder of its own
for each list of overrides, in the order of the list. Where there is none, two steps are made and
their checkpoint is written. The position embeddings don't train.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from fastkd.distributed import start_ranks, stop_ranks
from fastkd.recipe import load_recipe
from fastkd.training import engine, setup
from fastkd.training.checkpoint import Checkpoints
from fastkd.training.checkpoint.states import read_state
from fastkd.training.loop import train_step

FROZEN = "bert.embeddings.position_embeddings.weight"


def check_weights(module: Any, folder: Path) -> None:
    """See that the model computes with the weights of a checkpoint, in its precision."""
    stored = {}
    for path in folder.glob("parameters_rank_*.safetensors"):
        stored |= {name: tensors["weight"] for name, tensors in read_state(path).items()}
    named = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        for name, parameter in named.items():
            assert torch.equal(parameter, stored[name].to(parameter.dtype)), name


def frozen(module: Any, *arguments: Any) -> Any:
    """An engine around a module of which a part doesn't train."""
    module.student.get_parameter(FROZEN).requires_grad_(False)
    return engine.make_engine(module, *arguments)


if __name__ == "__main__":
    ranks = start_ranks()
    setup.make_engine = frozen
    for number, overrides in enumerate(json.loads(sys.argv[3])):
        recipe = load_recipe(sys.argv[1], overrides)
        run = setup.set_up(recipe, ranks, progress=False)
        checkpoints = Checkpoints(Path(recipe.run.output) / "checkpoints", ranks, 1)
        tag = checkpoints.newest()
        if tag is None:
            micro_batches = run.micro_batches()
            for step in range(2):
                train_step(run, micro_batches.next_step(step))
            checkpoints.save(run.engine, 2, {"step": 2})
            continue
        state = checkpoints.load(run.engine, tag, seed=0)
        into = Path(sys.argv[2]) / f"ranks-{ranks.world_size}-{number}"
        Checkpoints(into, ranks, 1).save(run.engine, state["step"], state)
        check_weights(run.module, checkpoints.folder / tag)
    stop_ranks()
