"""Try a model once on packed sequences: whether it makes of them what it makes of padded ones.

Whether attention stays within a sequence, from which number positions count, and where a head reads
is nothing that a model's configuration says; here it is compared.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.capture.blocks import find_blocks, no_cache
from fastkd.capture.packed_attention import pack_attention
from fastkd.capture.packed_pass import note_first_position, packed_keywords, padded_above
from fastkd.capture.recording import capture
from fastkd.capture.routing import runnable
from fastkd.capture.trial import trial_inputs
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.packed_row import PackedRow
from fastkd.types import Inputs

_REMEDY = "set task.padding=buckets"
# of the states' norm: kernels for other shapes round otherwise
_LEAST = 1e-4


def try_packed(model: PreTrainedModel, tokens: int = 8) -> None:
    """Let a model read packed rows, and see that it makes of them what it makes of padded batches.

    Args:
        model: on one device, which `try_model` took.
        tokens: length of the longest sequence that it will read.

    Raises:
        UserError: its attention takes no packed rows, or it gives other states or another output.
    """
    training = model.training
    model.eval()
    with torch.no_grad(), runnable(model):
        pack_attention(model)
        padded = trial_inputs(model, tokens)
        inputs, row = _packed(padded)
        expected = _run(model, {**padded, **no_cache(model)}, None)
        # RoBERTa and its kin count positions from the one after that of padding
        pad = getattr(model.config, "pad_token_id", None)
        candidates = [0] if pad is None or pad < 0 else [0, pad + 1]
        problems = []
        for first in candidates:
            problem = _differs(model, inputs, row, first, expected)
            if problem is None:
                note_first_position(model, first)
                break
            problems.append(problem)
        else:
            raise UserError(
                f"{type(model).__name__} can't read packed sequences ({problems[0]}); {_REMEDY}"
            )
    model.train(training)
    # `runnable` put the name of before back
    pack_attention(model)


def _packed(padded: dict[str, Tensor]) -> tuple[Inputs, PackedRow]:
    """The sequences of a padded batch in one row."""
    mask = padded["attention_mask"].bool()
    lengths = mask.sum(dim=1)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    positions = mask.cumsum(dim=1) - 1
    inputs = {
        "input_ids": padded["input_ids"][mask][None],
        "position_ids": positions[mask][None],
    }
    return inputs, PackedRow(tuple(lengths.tolist()), starts)


def _differs(
    model: PreTrainedModel, inputs: Inputs, row: PackedRow, first: int, expected: dict[str, Tensor]
) -> str | None:
    """What of a packed pass is not as expected, in words; `None` where all is."""
    keywords = {**inputs, **packed_keywords(inputs, row, first), **no_cache(model)}
    try:
        found = _run(model, keywords, row)
    except UserError:
        raise
    except FOREIGN_ERRORS as error:
        return f"{type(error).__name__}: {one_line(error)}"
    eps = torch.finfo(model.dtype).eps
    for number, (name, state) in enumerate(expected.items()):
        given = found.get(name)
        if given is None or given.shape != state.shape:
            shape = None if given is None else list(given.shape)
            return f"{name} is {shape}, expected {list(state.shape)}"
        valid = row.mask if state.ndim == 3 else None
        off = _distance(given, state, valid)
        # rounding adds up over the layers
        if not off <= max(_LEAST, 2 * eps * (1 + number)):
            return f"{name} is off by {off:.2g} of its norm"
    return None


def _run(
    model: PreTrainedModel, keywords: dict[str, Any], row: PackedRow | None
) -> dict[str, Tensor]:
    """States of all layers, of the end, and what the head gives, by name, as of a padded batch."""
    layers = range(len(find_blocks(model)) + 1)
    with ExitStack() as stack:
        if row is not None:
            stack.enter_context(padded_above(model, row))
        states = stack.enter_context(capture(model, hidden=layers, outputs=True))
        output = model(**keywords)
    made = {f"the state of layer {n}": states.hidden[n] for n in layers}
    if row is not None:
        made = {name: row.padded(state) for name, state in made.items()}
    assert states.outputs is not None, "it was captured"
    made["the last state"] = states.outputs
    logits = getattr(output, "logits", None)
    return made if logits is None else {**made, "what the head gives": logits}


def _distance(given: Tensor, expected: Tensor, valid: Tensor | None) -> float:
    given, expected = given.double(), expected.double()
    if valid is not None:
        given, expected = given[valid], expected[valid]
    return float((given - expected).norm() / expected.norm().clamp(min=1e-30))
