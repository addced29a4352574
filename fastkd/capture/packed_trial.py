"""Try a model once on packed sequences: whether it makes of them what it makes of padded ones.

Whether attention stays within a sequence, from which number positions count, and where a head reads
is nothing that a model's configuration says; here it is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.capture.blocks import capture_keywords, find_blocks
from fastkd.capture.modes import evaluating
from fastkd.capture.packed_attention import pack_attention
from fastkd.capture.packed_pass import note_first_position, reading_row, reads_rows
from fastkd.capture.recording import capture
from fastkd.capture.routing import runnable
from fastkd.capture.trial_inputs import trial_inputs
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.packed_row import PackedRow
from fastkd.types import LENGTHS, STARTS, Inputs, model_inputs

_REMEDY = "set task.padding=buckets"
# of the states' norm: kernels for other shapes round otherwise
_LEAST = 1e-4


def try_packed(model: PreTrainedModel, tokens: int = 8) -> None:
    """Let a model read packed rows from now on, and see that it makes of them what it made of
    padded batches.

    Args:
        model: on one device, which `try_model` took.
        tokens: length of the longest sequence that it will read.

    Raises:
        UserError: its attention takes no packed rows, or it gives other states or another output.
    """
    with evaluating(model), torch.no_grad(), runnable(model), _known_padding(model) as pad:
        padded = trial_inputs(model, tokens)
        expected = _run(model, {**padded, **capture_keywords(model)}, None)
        inputs = in_one_row(padded)
        running = model.config._attn_implementation
        pack_attention(model)
        # RoBERTa and its kin count positions from the one after that of padding
        candidates = [0] if pad < 0 else [0, pad + 1]
        problems = {first: _differs(model, inputs, first, expected) for first in candidates}
        right = [first for first, problem in problems.items() if problem is None]
        if not right:
            # a model that is refused is left as it came
            model.config._attn_implementation = running
            _, said = max(problem for problem in problems.values() if problem is not None)
            raise UserError(
                f"{type(model).__name__} can't read packed sequences ({said}); {_REMEDY}"
            )
        note_first_position(model, right[0])
    # `runnable` put the name of before back
    pack_attention(model)


@contextmanager
def _known_padding(model: PreTrainedModel) -> Iterator[int]:
    """Let a decoder that names no padding have one, by which its classifier finds a last token."""
    config: Any = model.config
    pad = getattr(config, "pad_token_id", None)
    if pad is None:
        config.pad_token_id = 0
    try:
        yield -1 if pad is None else pad
    finally:
        if pad is None:
            config.pad_token_id = None


def trial_batch(model: PreTrainedModel, tokens: int) -> Inputs:
    """`trial_inputs`, of a model that `try_packed` took in one row."""
    padded = trial_inputs(model, tokens)
    return in_one_row(padded) if reads_rows(model) else padded


def in_one_row(padded: Inputs) -> Inputs:
    """The sequences of a padded batch as a packed one."""
    mask = padded["attention_mask"].bool()
    lengths = mask.sum(dim=1)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    positions = mask.cumsum(dim=1) - 1
    return {
        "input_ids": padded["input_ids"][mask][None],
        "position_ids": positions[mask][None],
        LENGTHS: lengths,
        STARTS: starts,
    }


def _differs(
    model: PreTrainedModel, inputs: Inputs, first: int, expected: dict[str, Tensor]
) -> tuple[int, str] | None:
    """How far a packed pass is as expected, and what then isn't, in words; `None` where all is."""
    row = PackedRow.of(inputs)
    assert row is not None, "it is packed"
    try:
        with reading_row(model, model_inputs(inputs), row, first) as read:
            found = _run(model, {**read, **capture_keywords(model)}, row)
    except UserError:
        raise
    except FOREIGN_ERRORS as error:
        return -1, f"{type(error).__name__}: {one_line(error)}"
    eps = torch.finfo(model.dtype).eps
    for number, (name, state) in enumerate(expected.items()):
        given = found.get(name)
        if given is None or given.shape != state.shape:
            shape = None if given is None else list(given.shape)
            return number, f"{name} is {shape}, expected {list(state.shape)}"
        valid = row.mask if state.ndim == 3 else None
        off = _distance(given, state, valid)
        # rounding adds up over the layers; embeddings hardly have any
        if not off <= max(_LEAST, eps * (2 * number + 0.25)):
            return number, f"{name} is off by {off:.2g} of its norm"
    return None


def _run(
    model: PreTrainedModel, keywords: dict[str, Any], row: PackedRow | None
) -> dict[str, Tensor]:
    """States of all layers, of the end, and what the head gives, by name, as of a padded batch."""
    layers = range(len(find_blocks(model)) + 1)
    with capture(model, hidden=layers, outputs=True) as states:
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
