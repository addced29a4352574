"""A run goes on with another number of ranks and at another ZeRO stage, as if it had always run so.

What a checkpoint holds is the same, bit for bit, whichever engine it was taken from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_config
from tiny_runs import assert_same_run, keys, make_recipe, run_script, run_variants
from torch import Tensor

from fastkd.training.checkpoint.states import read_state

PIECES = {"stage3_param_persistence_threshold": 0}


def _layout(stage: int, **zero: Any) -> dict[str, Any]:
    section = {"deepspeed.zero_optimization": zero} if zero else {}
    return {"train.zero_stage": stage, **section}


OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
# ranks and layout of each two steps; ZeRO-3 changes a process, and each has one of its own
CHAIN = (
    (1, _layout(0)),
    (2, _layout(1)),
    (4, _layout(3, **PIECES)),
    (1, _layout(2, **OFFLOADED)),
    (2, _layout(3, offload_param={"device": "cpu"}, **OFFLOADED, **PIECES)),
)
# by precision: what a run was made with, and what its state is moved through, on other ranks
MOVES = {
    "fp32": (
        (1, _layout(0)),
        (3, [_layout(1), _layout(2, round_robin_gradients=True), _layout(0), _layout(3, **PIECES)]),
    ),
    "bf16": (
        (2, _layout(1)),
        (3, [_layout(2), _layout(1, **OFFLOADED), _layout(1), _layout(3)]),
    ),
}

HEAD = {"student.head": "masked_lm", "losses.logits": {"weight": 0.1}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that three ranks can't cut evenly, and a projection with a learning rate of its own."""
    folder = tmp_path_factory.mktemp("layouts")
    student = {"layers": 2, "hidden_size": 20, "heads": 4, "intermediate_size": 37}
    train = {"batch_size": 12, "schedule": "constant", "warmup_steps": 1, "checkpoint_every": 2}
    recipe = make_recipe(folder, student=student, train=train)
    torch.manual_seed(0)
    transformers.AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(
        folder / "teacher"
    )
    return recipe


def test_a_run_goes_on_with_other_ranks_and_stages(recipe: Path) -> None:
    whole, run = recipe.parent / "whole", recipe.parent / "run"
    steps = 2 * len(CHAIN)
    run_variants(recipe, [keys({"run.output": str(whole), "train.steps": steps})])
    before = 0
    for number, (ranks, layout) in enumerate(CHAIN, start=1):
        given = {"run.output": str(run), "train.steps": 2 * number, **layout}
        said = run_variants(recipe, [keys(given)], ranks=ranks)
        changed = f"ranks, this is a run of {ranks}" in said or "1 rank, this is" in said
        assert changed == (before not in (0, ranks)), said
        before = ranks
    assert_same_run(run, whole, losses=1e-6, weights=1e-6)


def _parameters(folder: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for path in folder.glob("step-*/parameters_rank_*.safetensors"):
        share = read_state(path)
        assert not share.keys() & found.keys()
        found |= share
    return found


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("precision", MOVES)
def test_a_state_is_the_same_in_every_layout(recipe: Path, precision: str) -> None:
    (ranks, layout), (others, layouts) = MOVES[precision]
    run, moved = recipe.parent / precision, recipe.parent / f"{precision}-moved"
    given = {"run.output": str(run), "train.precision": precision, **HEAD}
    for number, variants in ((ranks, [layout]), (others, layouts), (1, layouts)):
        overrides = [keys({**given, **variant}) for variant in variants]
        arguments = (str(recipe), str(moved), json.dumps(overrides))
        done = run_script("moved_states.py", *arguments, ranks=number)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    saved = _parameters(run / "checkpoints")
    (frozen,) = (name for name, stored in saved.items() if stored.keys() == {"weight"})
    # the decoder of the head is the word embeddings, and stands once
    assert frozen.endswith("position_embeddings.weight") and "decoder.weight" not in str(saved)
    for name in saved.keys() - {frozen}:
        assert {"weight", "exp_avg", "exp_avg_sq", "step"} == saved[name].keys()
        assert saved[name]["weight"].dtype == torch.float32
    folders = sorted(moved.iterdir())
    assert len(folders) == 2 * len(layouts)
    for folder in folders:
        found = _parameters(folder)
        assert found.keys() == saved.keys()
        for name, stored in saved.items():
            assert found[name].keys() == stored.keys()
            for key, value in stored.items():
                there = found[name][key]
                assert there.dtype == value.dtype and there.shape == value.shape
                assert _bits(there) == _bits(value), (folder, name, key)
