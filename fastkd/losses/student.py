"""The module that trains: it captures the student, computes the losses and returns them.

Under ZeRO-3 parameters are whole only inside the forward of the module that owns them, so all of
it happens in one.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture import Capture, capture, no_cache
from fastkd.capture.lm_head import last_hidden_state
from fastkd.losses.counts import model_inputs
from fastkd.losses.objective import Objective
from fastkd.types import Inputs


class DistilledStudent(nn.Module):
    """Everything that trains: the student and the projections of its objective."""

    def __init__(self, student: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(
        self,
        inputs: Inputs,
        teacher: Capture | None = None,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the student on a micro-batch and, given what the teacher left, compare the two.

        Args:
            inputs: `input_ids` and perhaps `attention_mask`, both [batch, tokens], what else the
                models read, and perhaps `labels`.
            teacher: what the teacher left on the same inputs.
            shares: fp32 [DIVISORS], see `Objective.forward`.

        Returns:
            The total, a scalar, and raw and weighted losses [2, labels], detached. Without a
            teacher the last hidden state [batch, tokens, width] and an empty tensor: under ZeRO-3
            the student can't be run from outside.
        """
        read = {**model_inputs(inputs), **no_cache(self.student)}
        if teacher is None or shares is None:
            state = last_hidden_state(self.student, self.student, read)
            return state, state.new_empty(0)
        with capture(self.student, **self.objective.layers("student")) as states:
            self.student(**read)
        result: tuple[Tensor, Tensor] = self.objective(states, teacher, inputs, shares)
        return result
