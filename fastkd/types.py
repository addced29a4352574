"""Types and values that every level shares; a recipe is read without loading torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

AnyPath: TypeAlias = str | os.PathLike[str]
TaskKind = Literal["sequence_classification", "token_classification", "question_answering"]
"""What a task asks of a model, which is also the head that answers."""
Metric = Literal[
    "matthews",
    "accuracy",
    "f1",
    "pearson",
    "spearman",
    "entity_f1",
    "token_accuracy",
    "exact_match",
    "answer_f1",
]
"""What predictions of a task are scored by."""
Head = Literal["none", TaskKind, "causal_lm", "masked_lm"]
"""What stands on a model's blocks."""
Combine = Literal["mean", "concatenate"]
"""What embeddings of several teachers come to."""
EightBits = Literal["float8", "int8"]
"""Kinds of numbers of a byte that a teacher's linear layers multiply."""
Side = Literal["student", "teacher"]
Unit = Literal["paragraph", "line", "row", "sentence"]
"""What of a text is a document, or is read by itself."""
Inputs: TypeAlias = "Mapping[str, Tensor]"
"""What both models read: `input_ids` [batch, tokens] and what goes with them."""
Reading = Literal["states", "embeddings", "predictions"]
"""Last hidden states [batch, tokens, width], embeddings made of them [batch, dim], or what a task's
head gives, see `Capture.logits`."""

ROWS = "rows"
"""Key of a micro-batch to train on: numbers of its blocks, examples or sequences among all, int64
[batch], for what is stored by row; always on the CPU."""
LENGTHS = "lengths"
"""Key of a micro-batch whose sequences follow each other in one row, see `fastkd.packed_row`: their
lengths, int64 [sequences]; always on the CPU."""
STARTS = "cu_seq_lens"
"""Key of such a micro-batch: where each sequence begins, int32 [sequences + 1]."""
STORED = "stored/"
"""What keys of a micro-batch to train on begin with under which the teacher's states are found, as
they are stored: [batch, places, numbers]."""
LABEL_WEIGHTS = "label_weights"
"""Key of a micro-batch: what each of its labels counts in a mean over labels, fp64 and of their
shape; all alike where it is not there."""
LARGEST_SCORE = 3.4028234663852886e38
"""Largest number of fp32, in which scores of data are kept."""
SCORES = "scores"
"""Key of a micro-batch of rows of texts: a teacher's scores of each row's candidates, fp32 [rows,
candidates], where the data has some."""
TEACHER = "teacher."
"""What keys of a micro-batch begin with under which a teacher with a tokenizer of its own finds its
inputs: the same texts in the same order, padded to their own length."""
IGNORE_INDEX = -100
"""A label that counts nowhere, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from."""

    name: str
    """Hub name, folder, or `package:NAME/FOLDER` for a model carried by an installed package."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    sha256: str | None = None
    """Expected digest of `model.safetensors`."""


def model_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """What a model reads of a micro-batch: of labels it would compute a loss of its own."""
    others = ("labels", LABEL_WEIGHTS, ROWS, LENGTHS, STARTS, SCORES)
    return {
        name: tensor
        for name, tensor in inputs.items()
        if name not in others and not name.startswith((STORED, TEACHER))
    }


def teacher_inputs(inputs: Inputs) -> Inputs:
    """A micro-batch as the teacher reads it: other tokens, where it has a tokenizer of its own."""
    own = {n.removeprefix(TEACHER): tensor for n, tensor in inputs.items() if n.startswith(TEACHER)}
    return own or inputs
