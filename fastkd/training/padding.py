"""Which token pads, as models that classify are told: a decoder's head reads the last before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.data.datamodule import DataModule
from fastkd.data.rows.datamodule import RowDataModule
from fastkd.data.tasks import hand_on_padding, reads_padding
from fastkd.training.vocabularies import Tokenizers


def pad_as_read(
    datamodule: DataModule,
    tokenizers: Tokenizers,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    others: Sequence[PreTrainedModel],
) -> dict[str, Any]:
    """`pad_alike` of all models that classify, each as its own tokenizer's sequences are padded.

    Args:
        datamodule: of the run.
        tokenizers: of the student and the teachers.
        student: what trains.
        teacher: the first one.
        others: further teachers, which read what the first one does.
    """
    if tokenizers.teacher is None:
        kept = pad_alike(datamodule, tokenizers.exported, student, teacher)
    else:
        assert isinstance(datamodule, RowDataModule), "rows alone are read by two tokenizers"
        teacher.config.pad_token_id = datamodule.teacher_pad_id
        kept = pad_alike(datamodule, tokenizers.exported, student)
    for other in others:
        other.config.pad_token_id = teacher.config.pad_token_id
    return kept


def pad_alike(
    datamodule: DataModule, tokenizer: PreTrainedTokenizerBase, *models: PreTrainedModel
) -> dict[str, Any]:
    """Tell classifiers which token pads: a decoder's head reads the last token before it.

    Returns:
        What the configuration of the first of them is handed on with, see `hand_on_padding`.
    """
    config = models[0].config
    kept = getattr(config, "pad_token_id", None)
    pad = datamodule.pad_id
    if pad is not None:
        if reads_padding(models[0]):
            kept = hand_on_padding(config, tokenizer, pad, datamodule.sets)
    else:
        # blocks of text have no padding, and a decoder that knows of none reads no batch
        pad = -1 if kept is None else kept
    for model in models:
        model.config.pad_token_id = pad
    return {"pad_token_id": kept}
