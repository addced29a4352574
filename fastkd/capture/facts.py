"""Facts of a model that its configuration doesn't say: tokens it has room for, and what it sees.

Others ask for them alone, without a trial.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from fastkd.capture.blocks import capture_keywords, find_blocks
from fastkd.capture.modes import evaluating
from fastkd.capture.recording import capture
from fastkd.capture.routing import runnable
from fastkd.capture.trial_inputs import padded, trial_inputs


def usable_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text that a model has positions for, `None` where none are counted."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # models without a limit may say -1
    if not isinstance(positions, int) or positions <= 0:
        return None
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        table = getattr(module, "position_embeddings", None)
        if isinstance(padding, int) and isinstance(table, nn.Embedding):
            # RoBERTa and its kin count from the place behind padding's
            return positions - padding - 1
    return positions


def sees_ahead(model: PreTrainedModel) -> bool:
    """Whether a model's first token sees the ones behind it; of one that reads tokens."""
    first = trial_inputs(model, 4)["input_ids"][0]
    changed = first.clone()
    changed[-1] = first[first != first[-1]][0]
    states = []
    with evaluating(model), torch.no_grad(), runnable(model):
        for ids in (first, changed):
            with capture(model, outputs=True) as seen:
                model(input_ids=ids[None], **capture_keywords(model))
            assert seen.outputs is not None, "it was captured"
            states.append(seen.outputs[0, 0])
    return not torch.equal(*states)


def hands_on_last_block(model: PreTrainedModel) -> bool:
    """Whether a model's output is the state of its last block, with no norm behind it; of one whose
    blocks can be captured."""
    depth = len(find_blocks(model))
    recorded = capture(model, hidden={depth}, outputs=True)
    with evaluating(model), torch.no_grad(), runnable(model), padded(model), recorded as states:
        model(**trial_inputs(model, 4), **capture_keywords(model))
    return states.outputs is not None and torch.equal(states.outputs, states.hidden[depth])
