"""A teacher in a run: frozen models, or states of them from a disk, and what the losses read there.

A teacher runs no deeper than the losses ever need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture import Capture, CompiledCapture, at_depth, capture, reading
from fastkd.capture.alone import alone
from fastkd.capture.lm_head import last_hidden_state
from fastkd.capture.routing import inside
from fastkd.data.datamodule import MicroBatches
from fastkd.layer_map import Progress
from fastkd.losses.objective import Objective
from fastkd.losses.pooling import EmbeddingModules
from fastkd.models.quantised import Quantised
from fastkd.packed_row import valid_tokens
from fastkd.types import STORED, Inputs, teacher_inputs

Wanted = Mapping[str, Any]
"""Keyword arguments of `capture`."""


class StoredStates(Protocol):
    """States of a teacher by row, from a disk, in the place of a teacher that runs."""

    heldout: bool
    """Whether they are also of held-out rows; else of those to train on alone."""
    has_scores: bool
    """Whether they hold what a head for a task gives."""

    def beside(self, inputs: Inputs, wanted: Wanted) -> Inputs:
        """A micro-batch that also holds what is stored of its rows.

        Args:
            inputs: with numbers of rows, on the CPU.
            wanted: keyword arguments of `capture`.
        """

    def reading(
        self, micro_batches: MicroBatches, wanted_at: Callable[[Progress], Wanted]
    ) -> MicroBatches:
        """Micro-batches that also hold what is stored of their rows.

        Args:
            micro_batches: with numbers of rows.
            wanted_at: what is wanted at a moment of the run; is called by whatever thread asks for
                a step.
        """

    def __call__(self, inputs: Inputs, wanted: Wanted) -> Capture:
        """What `capture` would have recorded of the teacher on a micro-batch that holds it."""


@dataclass(frozen=True)
class OtherTeacher:
    """A frozen teacher beside the first, which reads the same tokens."""

    model: PreTrainedModel
    modules: EmbeddingModules
    """What makes its embeddings."""

    def __call__(self, inputs: Inputs, first: Capture) -> Capture:
        """Its embedding and its scores, where those of the first teacher are there.

        Args:
            inputs: as the first teacher reads them.
            first: what was captured of that.
        """
        embeds, scores = first.embedding is not None, isinstance(first.logits, Tensor)
        recorded = capture(self.model, outputs=embeds, logits=scores)
        with torch.no_grad(), reading(self.model, inputs) as read, recorded as states:
            self.model(**read)
        made = None
        if states.outputs is not None:
            with torch.no_grad():
                made = self.modules(states.outputs, valid_tokens(inputs))
        return Capture(logits=states.logits, embedding=made)


class TeacherRunner:
    """A frozen teacher, called on a micro-batch for what the losses need of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        engine: nn.Module | None = None,
        *,
        quantised: Quantised | None = None,
        others: Sequence[OtherTeacher] = (),
    ) -> None:
        """Let a teacher run.

        Args:
            model: frozen, on the device where it runs.
            objective: whose layers are captured.
            engine: from `shard_teacher`, where the model is not whole.
            quantised: what of it is in eight bits.
            others: further teachers, on that device.
        """
        self.model = model
        self.objective = objective
        self.quantised = quantised
        self.others = tuple(others)
        self._run = model if engine is None else engine
        self.compiled: CompiledCapture | None = None
        """What runs it while the objective is in training mode, where that is compiled."""
        self.stored: StoredStates | None = None
        """What gives its states of rows, where they are stored."""
        with alone(model):
            self._settle()
            self._cut = self._find_cut()

    def __call__(self, inputs: Inputs, *, whole: bool = False) -> Capture:
        """Run as deep as the objective ever needs, or all of it, and return what is needed now."""
        if self.stored is not None and not whole and any(n.startswith(STORED) for n in inputs):
            return self.stored(inputs, self.objective.layers("teacher"))
        wanted = self.objective.layers("teacher")
        compiled = self.compiled if self.objective.training and not whole else None
        # other distillers may run it in threads of theirs
        with alone(self.model, guarded=compiled is None), torch.no_grad():
            self._settle()
            cut = nullcontext() if whole else self._cut
            with cut, reading(self.model, teacher_inputs(inputs)) as read:
                if compiled is not None:
                    states = compiled(read, wanted)
                else:
                    with capture(self.model, **wanted) as states:
                        self._run(**read)
        return self._condensed(states, inputs)

    def _settle(self) -> None:
        """Put the teacher into eval mode, whatever a module that holds it was put into since."""
        if any(module.training for module in inside(self._run)):
            # of DeepSpeed's engine it returns nothing
            self._run.eval()

    def record(self, inputs: Inputs, wanted: Wanted | None = None) -> Capture:
        """Run as deep as the objective ever needs, and return what it may ever need; or what is
        named, be it deeper."""
        wanted = self.objective.all_layers("teacher") if wanted is None else wanted
        depth = self.objective.teacher_depth
        deepest = max(wanted["attention"] | wanted["hidden"], default=0)
        cut = self._cut if depth is None or deepest <= depth else nullcontext()
        recorded = capture(self.model, **wanted)
        reads = reading(self.model, teacher_inputs(inputs))
        with alone(self.model), torch.no_grad(), cut, reads as read, recorded as states:
            self._run(**read)
        return self._condensed(states, inputs)

    def _condensed(self, states: Capture, inputs: Inputs) -> Capture:
        """What the losses read of all teachers, once the first has run."""
        read, several = teacher_inputs(inputs), self.objective.pair.ensemble
        found = self.objective.condensed(states, valid_tokens(read))
        if several is None:
            return found
        return several(found, [other(read, found) for other in self.others])

    def embed(self, inputs: Inputs) -> Tensor:
        """The first teacher's last hidden state [batch, tokens, width], at full depth."""
        with torch.no_grad(), reading(self.model, teacher_inputs(inputs)) as read:
            return last_hidden_state(self._run, self.model, read)

    def _find_cut(self) -> AbstractContextManager[None]:
        full, depth = self.model.config.num_hidden_layers, self.objective.teacher_depth
        if depth is None or depth >= full:
            return nullcontext()
        return at_depth(self.model, max(depth, 1))


class NoTeacher:
    """Stands for a teacher where hard labels teach: it leaves nothing to be compared with."""

    def __call__(self, inputs: Inputs, *, whole: bool = False) -> Capture:
        return Capture()
