"""TextBrewer's row: its `GeneralDistiller` on what models give with `output_attentions`.

A model's outputs hold probabilities, never scores. Its other way in, custom matches of modules,
fails in the release of PyPI (`custom_matches_cache['match_weghts']`).
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.layers import PROBABILITIES, make_pair
from benchmarks.peers.rows import LEARNING_RATE, Case, Step

ASKED = {"output_hidden_states": True, "output_attentions": True}


def textbrewer_row(case: Case) -> Step:
    """The body of its `train_with_num_steps`, a step at a time."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    pair = make_pair(case, "eager")
    weight = pair.weight_of_mean(PROBABILITIES)
    attention = {"feature": "attention", "loss": "attention_mse", "weight": weight}
    hidden = {"feature": "hidden", "loss": "hidden_mse", "weight": 1}
    matches: list[dict[str, Any]] = [
        # maps are counted from 0
        {**attention, "layer_S": s - 1, "layer_T": t - 1}
        for s, t in pair.links
    ]
    widths = (pair.student.config.hidden_size, pair.teacher.config.hidden_size)
    for s, t in pair.states:
        matches.append({**hidden, "layer_S": s, "layer_T": t})
        if len(pair.projections):
            matches[-1]["proj"] = ["linear", *widths]
    distiller = GeneralDistiller(
        # it makes its folder at once
        TrainingConfig(device=case.device, output_dir=tempfile.gettempdir()),
        DistillationConfig(intermediate_matches=matches),
        pair.teacher,
        pair.student,
        _adaptor,
        _adaptor,
    )
    made = [linear for linear in distiller.projs if linear is not None]
    for linear, own in zip(made, pair.projections, strict=True):
        linear.to(own.weight.dtype).load_state_dict(own.state_dict())
    optimizer = torch.optim.AdamW(pair.student.parameters(), lr=LEARNING_RATE, fused=True)
    # gives the optimiser the projections
    distiller.initialize_training(optimizer, None, None, None)
    # stays open: the process ends with the measurement
    distiller.__enter__()

    def run() -> Tensor:
        total, losses = distiller.train_on_batch(pair.inputs, ASKED)
        distiller.write_loss(total, 0, losses)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    return Step(run=run, optimizer=optimizer)


def _adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
    """What it reads of a model's outputs."""
    return {
        "hidden": outputs.hidden_states,
        "attention": outputs.attentions,
        "inputs_mask": batch["attention_mask"],
    }
