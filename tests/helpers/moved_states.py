"""Load a checkpoint into engines of several layouts, and save each anew without making a step.

Used as `python moved_states.py recipe.yaml FOLDER '[["train.zero_stage=2", ...], ...]'`, also under
torchrun: the newest checkpoint of `run.output` is loaded, and one is written to a folder of its own
for each list of overrides, in the order of the list.
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
from fastkd.training.checkpoint import Checkpoints
from fastkd.training.checkpoint.states import read_state
from fastkd.training.setup import set_up


def check_weights(engine: Any, folder: Path) -> None:
    """See that the model computes with the weights of a checkpoint, in its precision."""
    stored = {}
    for path in folder.glob("parameters_rank_*.safetensors"):
        stored |= {name: tensors["weight"] for name, tensors in read_state(path).items()}
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        for name, parameter in named.items():
            assert torch.equal(parameter, stored[name].to(parameter.dtype)), name


if __name__ == "__main__":
    ranks = start_ranks()
    for number, overrides in enumerate(json.loads(sys.argv[3])):
        recipe = load_recipe(sys.argv[1], overrides)
        run = set_up(recipe, ranks, progress=False)
        checkpoints = Checkpoints(Path(recipe.run.output) / "checkpoints", ranks, 1)
        tag = checkpoints.newest()
        assert tag is not None
        state = checkpoints.load(run.engine, tag, seed=0)
        into = Path(sys.argv[2]) / f"ranks-{ranks.world_size}-{number}"
        Checkpoints(into, ranks, 1).save(run.engine, state["step"], state)
        check_weights(run.engine, checkpoints.folder / tag)
    stop_ranks()
