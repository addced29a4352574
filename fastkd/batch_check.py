"""What a batch of one's own loop must hold for two models and their losses: `BatchCheck`."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.capture import vocabulary_size
from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.losses.counts import target_labels
from fastkd.types import IGNORE_INDEX, Head, Inputs, model_inputs

_WINDOWS = ("sliding_window", "local_attention", "attention_chunk_size", "window_size")
"""What configurations call the tokens that local attention sees."""


class BatchCheck:
    """Sees of every batch that it holds what both models and the losses read."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        head: Head,
        *,
        tried: int | None,
        reader: str | None,
    ) -> None:
        """Look up what both models read.

        Args:
            student: reads the batches.
            teacher: reads them too.
            head: that both have.
            tried: tokens that their attention was tried on; `None` where no loss reads it.
            reader: name of the loss that learns from labels.

        Raises:
            UserError: a model that embeds no tokens.
        """
        self._student, self._teacher, self._head = student, teacher, head
        self._tried, self._reader = tried, reader
        self._rows = vocabulary_size(student), vocabulary_size(teacher)
        self._keywords = [set(signature(model.forward).parameters) for model in (student, teacher)]

    @property
    def needs_labels(self) -> bool:
        """Whether a loss reads labels that a batch must hold; a causal model's are its ids where
        not given."""
        return self._reader is not None and HEADS[self._head].labels != "next_token"

    def __call__(self, batch: Inputs) -> Inputs:
        """The batch, once it is seen to hold what is read.

        Raises:
            UserError: naming what is missing, or what no model reads.
        """
        if not isinstance(batch, Mapping):
            raise UserError(
                f"the batch is a {type(batch).__name__}, expected a mapping with input_ids "
                "[batch, tokens] and what goes with them"
            )
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            found = f"of shape {list(ids.shape)}" if isinstance(ids, Tensor) else "of none"
            raise UserError(
                f"the batch has the keys {', '.join(map(str, batch)) or 'none'}, and input_ids "
                f"{found}; expected input_ids [batch, tokens]"
            )
        if not ids.numel():
            raise UserError(
                f"input_ids of the batch are {list(ids.shape)}, expected tokens; leave empty "
                "batches out"
            )
        self._check_length(ids.shape[1])
        self._check_ids(ids)
        mask = batch.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UserError(
                f"attention_mask is {shape}, expected {list(ids.shape)} as input_ids; losses read "
                "from it which tokens are padding"
            )
        _check_one_text(batch)
        for key, value in batch.items():
            if key != "labels" and not isinstance(value, Tensor):
                raise UserError(
                    f"{key} of the batch is a {type(value).__name__}, expected tensors alone; take "
                    "it out"
                )
        sides = ("student", self._student), ("teacher", self._teacher)
        for (side, model), known in zip(sides, self._keywords, strict=True):
            strange = [str(key) for key in batch if key != "labels" and key not in known]
            if strange:
                raise UserError(
                    f"the {side} {type(model).__name__} reads no {', '.join(strange)}; take it out "
                    "of the batch: both models read the same"
                )
        return self._labelled(batch)

    def _check_length(self, tokens: int) -> None:
        """See that what attention hides of so many tokens was tried.

        Raises:
            UserError: a window that the trial was too short to show.
        """
        if self._tried is None or tokens <= self._tried:
            return
        for model in (self._student, self._teacher):
            config = model.config.get_text_config()
            for field in _WINDOWS:
                width = getattr(config, field, None)
                # one more than the width may be seen, where it counts both sides apart
                if isinstance(width, int) and self._tried - 1 <= width < tokens:
                    raise UserError(
                        f"the batch has {tokens} tokens, of which {type(model).__name__} may hide "
                        f"some ({field} {width}), but both models were tried on {self._tried}; "
                        f"give Distiller(tokens={tokens}), or the most that any batch has"
                    )

    def _check_ids(self, ids: Tensor) -> None:
        """See that both models embed the ids, where one has more rows; on a GPU, where a look would
        wait for all work before it, the smaller table's own lookup fails.

        Raises:
            UserError: naming an id that one model doesn't embed.
        """
        rows = min(self._rows)
        if rows == max(self._rows) or ids.device.type != "cpu":
            return
        largest = int(ids.max())
        if largest >= rows:
            side = "student" if self._rows[0] == rows else "teacher"
            raise UserError(
                f"the batch holds the id {largest}, but the {side} embeds {rows} tokens (student "
                f"and teacher: {self._rows[0]} and {self._rows[1]}); give ids that both embed"
            )

    def _labelled(self, batch: Inputs) -> Inputs:
        """The batch with the labels that losses read, or without any.

        Raises:
            UserError: none, or of another shape than the head's outputs.
        """
        reader, of = self._reader, HEADS[self._head].labels
        labels, ids = batch.get("labels"), batch["input_ids"]
        # the first token of a span and the last one
        shape = ids.shape[:1] if of == "example" else (len(ids), 2) if of == "span" else ids.shape
        if isinstance(labels, Tensor) and labels.shape == shape:
            if reader is not None:
                self._check_labels(reader, batch, labels)
            return batch
        if reader is None or (labels is None and not self.needs_labels):
            return model_inputs(batch)
        given = f"a {type(labels).__name__}"
        if isinstance(labels, Tensor):
            given = f"{list(labels.shape)}"
        raise UserError(
            f"losses.{reader} learns from labels of shape {list(shape)}, but those of the batch "
            f"are {'missing' if labels is None else given}; give them, {IGNORE_INDEX} where there "
            "is none"
        )

    def _check_labels(self, reader: str, batch: Inputs, labels: Tensor) -> None:
        """See that the labels that count are among what the head chooses from; on a GPU, where a
        look would wait for all work before it, of what kind they are.

        Raises:
            UserError: naming a label that is none, or the dtype.
        """
        of = HEADS[self._head].labels
        classes = int(getattr(self._student.config, "num_labels", 0))
        if of == "example" and classes == 1:
            # a number, of any kind
            return
        if labels.dtype != torch.int64:
            raise UserError(
                f"losses.{reader} learns from labels that are numbers of classes or tokens, but "
                f"those of the batch are {labels.dtype}, expected torch.int64; give labels.long()"
            )
        if labels.device.type != "cpu":
            return
        choices, what = self._rows[0], "tokens of the student's vocabulary"
        if of == "span":
            choices, what = batch["input_ids"].shape[1], "places of the batch's tokens"
        elif of in ("example", "token"):
            choices, what = classes, "classes of the student"
        counted = target_labels(batch, self._head)
        assert counted is not None, "they are given"
        wrong = counted[(counted != IGNORE_INDEX) & ((counted < 0) | (counted >= choices))]
        if wrong.numel():
            raise UserError(
                f"losses.{reader} learns from the label {int(wrong[0])}, but there are {choices} "
                f"{what}, from 0; give one of them, or {IGNORE_INDEX} where there is none"
            )


def _check_one_text(batch: Inputs) -> None:
    """See that no row holds several texts, as of DataCollatorWithFlattening.

    Raises:
        UserError: one does.
    """
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return
    again = positions.diff() < 0
    if mask is not None and mask.shape == positions.shape:
        # padding on the left has any
        again &= mask[:, :-1].bool()
    # a look at the device, at batches alone that come with positions
    if bool(again.any()):
        raise UserError(
            "position_ids begin anew within a row, so it holds several texts, which losses would "
            "read as one; give a padded batch with its attention_mask"
        )
