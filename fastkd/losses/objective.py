"""All losses of a recipe, and how they add up; this file knows none of them by name.

What each is multiplied with stands in `step_weights.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture import Capture, CompiledCapture, PaddedStates, capture, reading
from fastkd.capture.lm_head import last_hidden_state
from fastkd.errors import UserError
from fastkd.layer_map import LayerMap, Progress, checked_links
from fastkd.losses.base import (
    Batch,
    Loss,
    LossGroup,
    LossInfo,
    ModelPair,
    Shared,
    Term,
    merged_layers,
)
from fastkd.losses.counts import (
    DIVISORS,
    Reduction,
    count_divisors,
    target_labels,
    tells_predictions,
)
from fastkd.losses.gathering import Gather, Notes, alone, undeclared
from fastkd.losses.pooling import EmbeddingModules
from fastkd.losses.registry import loss_class
from fastkd.losses.step_weights import StepWeights
from fastkd.losses.term_errors import checked_values, errors_at, key_of
from fastkd.losses.weighting import Uncertainty
from fastkd.packed_row import PackedRow, valid_tokens
from fastkd.plugins import plugin_errors
from fastkd.recipe import Losses
from fastkd.types import LABEL_WEIGHTS, ROWS, SCORES, Inputs, Side, teacher_inputs

_PLAIN = frozenset(("input_ids", "token_type_ids", ROWS, SCORES))
"""Inputs that hide nothing and label nothing."""
# the other kind runs blocks without gradients first, and what is captured then has none
_RECOMPUTED = " (under gradient checkpointing with use_reentrant=False)"


class Objective(nn.Module):
    """All terms of a recipe, and the projections that belong to them."""

    def __init__(
        self,
        losses: Losses,
        layers: LayerMap,
        pair: ModelPair,
        *,
        own_layers: Mapping[str, LayerMap] | None = None,
        steps: int = 1,
    ) -> None:
        """Choose the terms.

        Args:
            losses: section of the recipe.
            layers: the mapping in force.
            pair: what the two models are.
            own_layers: mappings of terms that have their own, by the term's name.
            steps: optimiser steps of the run, which schedules are stretched over.

        Raises:
            UserError: no projection is asked for, but the widths differ; or a mapping that a term
                can't use.
        """
        super().__init__()
        self.losses = losses
        self.pair = pair
        self.steps = steps
        self.moment = Progress()
        self.maps = {name: (own_layers or {}).get(name, layers) for name in losses.terms}
        self.reduction: Reduction = losses.reduction
        self.least_rows: dict[str, int] = {}
        """Rows that a batch must have, of each loss that compares rows."""
        self.terms = nn.ModuleList(self._terms())
        self._check_rates()
        if losses.projection_learning_rate is not None and not self.parameter_rates():
            raise UserError(
                "losses.projection_learning_rate is given, but nothing is projected; leave it out, "
                "or set losses.projection"
            )
        self.matches: tuple[LossInfo, ...] = tuple(m for term in self.each() for m in term.matches)
        # how many losses each term gives, and what a step would call it
        self._counts = [len(term.matches) for term in self.each()]
        self._keys = [key_of(term) for term in self.each()]
        self.weights = StepWeights(losses, self.matches, self.maps)
        self.names = self.weights.names
        of = [DIVISORS.index(match.divisor) for match in self.matches]
        self._divisor_of: Tensor
        self.register_buffer("_divisor_of", torch.tensor(of), persistent=False)
        balance = losses.balance
        self.uncertainty = (
            Uncertainty(len(self.names), balance.limit) if balance.kind == "uncertainty" else None
        )
        self._divisors: dict[object, Tensor] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """One name a loss, in the order of `forward`."""
        return tuple(match.label for match in self.matches)

    @property
    def teacher_depth(self) -> int | None:
        """The deepest teacher layer that is ever matched; `None` where outputs are."""
        wanted = self.layers("teacher")
        if wanted["logits"] or wanted["outputs"] or wanted["modules"]:
            return None
        terms = self.losses.terms
        mapped = [
            self.maps[name].teacher_depth
            for name, config in terms.items()
            if loss_class(config.loss).is_mapped()
        ]
        return max((0, *mapped))

    def at(self, moment: Progress) -> None:
        """Move to a moment of the run: random mappings and schedules follow it."""
        self.moment, share = moment, moment.step / self.steps
        self.weights.at(moment, share)
        for term, where in zip(self.each(), self._keys, strict=True):
            with errors_at(where, term):
                term.at(moment, share)

    def layers(self, side: Side, moment: Progress | None = None) -> dict[str, Any]:
        """What `capture` must record of one model now, as its keyword arguments; or at a moment,
        whatever the one that the losses stand at."""
        nothing: dict[str, Any] = {
            "attention": set(),
            "hidden": set(),
            "logits": False,
            "outputs": False,
            "modules": set(),
        }
        return merged_layers([nothing, *(term.layers(side, moment) for term in self.each())])

    def all_layers(self, side: Side) -> dict[str, Any]:
        """What `layers` may ever be; of mappings that move all layers that they may draw."""
        wanted = self.layers(side)
        # the student layers of a mapping are always the same
        if side == "teacher":
            moving = [layers for layers in self.maps.values() if layers.moves]
            drawn = {n for layers in moving for n in range(1, layers.teacher_depth + 1)}
            for kind in ("attention", "hidden"):
                wanted[kind] = wanted[kind] | drawn if wanted[kind] else wanted[kind]
        return wanted

    @property
    def reads_values(self) -> bool:
        """Whether any term reads the values of the attention that it captures."""
        kinds = [loss_class(config.loss).captures for config in self.losses.terms.values()]
        return any(captures.attention and captures.values for captures in kinds)

    def divisors(self, inputs: Inputs) -> Tensor:
        """What a micro-batch contributes to the divisors of a step: fp64 [DIVISORS]."""
        labels = target_labels(inputs, self.pair.head)
        # where their shape says it all, a step starts a dozen kernels less
        plain = labels is None and _PLAIN.issuperset(inputs)
        ids = inputs["input_ids"]
        shape = ids.shape, ids.device, torch.is_inference_mode_enabled()
        if plain and shape in self._divisors:
            return self._divisors[shape]
        told = tells_predictions(inputs, self.pair.head)
        found = count_divisors(inputs, self.pair.causal, self.reduction, labels, told=told)
        if plain:
            self._divisors[shape] = found
        return found

    def forward(
        self,
        student: Capture,
        teacher: Capture,
        inputs: Inputs,
        shares: Tensor,
        gather: Gather = alone,
    ) -> tuple[Tensor, Tensor]:
        """Add the terms up.

        Args:
            student: captured tensors with gradient.
            teacher: captured tensors without.
            inputs: what both models read; of it the mask and the labels.
            shares: [DIVISORS], this micro-batch's part of the step's divisors.
            gather: what gives rows of the whole step, see `Batch.gather`.

        Returns:
            The weighted total, a scalar, and [2, labels], detached: the raw losses, then what each
            adds to the total. All are scaled by the shares. The total of `uncertainty` holds the
            log-variances whole: an engine averages over micro-batches and ranks.
        """
        row, mask = PackedRow.of(inputs), valid_tokens(inputs)
        labels = target_labels(inputs, self.pair.head)
        read = teacher_inputs(inputs)
        batch = Batch(
            mask,
            labels,
            row,
            teacher_mask=mask if read is inputs else valid_tokens(read),
            scores=inputs.get(SCORES),
            gather=gather if self.least_rows else undeclared,
            label_weights=inputs.get(LABEL_WEIGHTS),
            ids=inputs["input_ids"],
            told=tells_predictions(inputs, self.pair.head),
        )
        views = self._views(student, teacher, row)
        values, takes_notes = [], isinstance(gather, Notes)
        for term, where, count in zip(self.each(), self._keys, self._counts, strict=True):
            if takes_notes and not self._compares(term):
                values.append(shares.new_zeros(count))
                continue
            with errors_at(where, term):
                found = term(*views(term), batch)
            values.append(checked_values(term, found, count))
        if self.training and torch.is_grad_enabled() and not takes_notes:
            self._check_gradients(values)
        losses = torch.cat(values)
        raw = losses * shares[self._divisor_of]
        weights = self.weights.of_losses(raw, training=self.training)
        weighted = raw * weights
        if self.uncertainty is not None:
            on = self.weights.by_term(weights) > 0
            total, scales = self.uncertainty(self.weights.by_term(weighted), on)
            weighted = weighted.detach() * self.weights.spread(scales)
        else:
            total = weighted.sum()
        return total, torch.stack([raw.detach(), weighted.detach()])

    def variance_total(self) -> Tensor:
        """What the log-variances of `uncertainty` are in the total of every micro-batch."""
        assert self.uncertainty is not None, "it is asked where they are learned"
        learned = self.uncertainty.log_variances
        weights = self.weights.of_losses(learned, training=self.training)
        on = self.weights.by_term(weights) > 0
        total: Tensor = self.uncertainty(torch.zeros_like(learned), on)[0]
        return total

    def condensed(self, teacher: Capture, mask: Tensor | None) -> Capture:
        """A teacher's pass as the losses read it: where they read embeddings, made here, and no
        states of tokens, these are let go.

        Args:
            teacher: what was captured.
            mask: bool [batch, tokens] of what it read, `None` where nothing is padded.
        """
        made = {term: term.teacher_embedding(teacher, mask) for term in self.each()}
        found = [vectors for vectors in made.values() if vectors is not None]
        if not found:
            return teacher
        others = [term for term in self.each() if made[term] is None]
        kept = merged_layers(term.layers("teacher") for term in others).get("outputs", False)
        outputs = teacher.outputs if kept else None
        return replace(teacher, outputs=outputs, embedding=found[0])

    def _views(
        self, student: Capture, teacher: Capture, row: PackedRow | None
    ) -> Callable[[Term], tuple[Capture, Capture]]:
        """What a term is given of a pass: what was captured, or padded views of a packed row."""
        if row is None:
            return lambda term: (student, teacher)
        values = self.reads_values
        padded = [PaddedStates(found, row, values=values) for found in (student, teacher)]

        def of(term: Term) -> tuple[Capture, Capture]:
            if term.reads_packed:
                return student, teacher
            return padded[0].of(term.layers("student")), padded[1].of(term.layers("teacher"))

        return of

    def parameter_rates(self) -> dict[str, float]:
        """Peak learning rates of those of its parameters that have another than the run's."""
        return {
            f"terms.{number}.{name}": rate
            for number, term in enumerate(self.each())
            for name, rate in term.parameter_rates().items()
        }

    def _compares(self, term: Term) -> bool:
        """Whether a term compares rows with each other."""
        return any(match.term in self.least_rows for match in term.matches)

    def _check_gradients(self, values: Sequence[Tensor]) -> None:
        """See that no loss is a constant beside others that train the student."""
        if not any(value.requires_grad for value in values):
            return
        for term, value in zip(self.each(), values, strict=True):
            if not value.requires_grad:
                raise UserError(
                    f"{key_of(term)}: what {type(term).__name__} gives has no gradient; compute it "
                    f"from states of the student that train{_RECOMPUTED}, or leave it out"
                )

    def _check_rates(self) -> None:
        for term in self.each():
            own = dict(term.named_parameters())
            for name in term.parameter_rates():
                if name not in own:
                    raise UserError(
                        f"{key_of(term)}: {type(term).__name__}.parameter_rates names "
                        f"{name}, which is none of its parameters ({', '.join(own) or 'none'})"
                    )

    def embedding(self, side: Side) -> EmbeddingModules | None:
        """What makes a model's embedding of its final states, as its user gets it: the teacher's by
        its own modules, the student's by those that it is exported with; `None` where fastkd
        doesn't know the teacher's. The objective's parameters must be whole."""
        known = self.pair.embeddings
        if known is None or side == "teacher":
            return None if known is None else known[1]
        return self.student_modules() or known[0]

    def student_modules(self) -> EmbeddingModules | None:
        """Modules of the student's embedding where its losses say it: those of embeddings or,
        without any, a hidden loss that projects its last layer to the teacher's; `None`
        elsewhere."""
        made = (term.student_modules() for term in self._deciding())
        return next((found for found in made if found is not None), None)

    def begin_from(self, start: EmbeddingModules) -> bool:
        """Let the projection that the student is exported with begin as that of the model that the
        student starts from; whether it does."""
        made = (term for term in self._deciding() if term.student_modules() is not None)
        deciding = next(made, None)
        return deciding is not None and deciding.begin_from(start)

    def _deciding(self) -> list[Term]:
        """The terms that may say how the student's embedding is made."""
        terms = self.each()
        return [term for term in terms if term.embeds] or terms

    def kept(self) -> dict[str, Tensor]:
        """The weights that an evaluation needs later: projections, no log-variances."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("uncertainty.")}

    def _terms(self) -> list[Term]:
        """A module for each loss or, of those that are computed together, for all of them."""
        given = self.losses
        shared = Shared(
            self.pair,
            given.reduction,
            given.projection,
            given.projection_bias,
            given.projection_learning_rate,
        )
        made: dict[object, list[Loss]] = {}
        for name, config in given.terms.items():
            kind = loss_class(config.loss)
            layer_map = self.maps[name] if kind.is_mapped() else None
            with plugin_errors(f"losses.{name}", kind):
                loss = kind(name, config, layer_map, shared)
            if loss.least_rows > 1:
                self.least_rows[name] = loss.least_rows
            made.setdefault(loss.group or name, []).append(loss)
        return [
            group(losses, shared)
            if isinstance(group, type) and issubclass(group, LossGroup)
            else losses[0]
            for group, losses in made.items()
        ]

    def each(self) -> list[Term]:
        """The modules that compute the losses, in order."""
        return [term for term in self.terms if isinstance(term, Term)]

    @property
    def changes_on_host(self) -> str | None:
        """What of a step is decided in Python anew, so that a recorded one would repeat it; `None`
        where only weights are, which `StepWeights.refresh` writes."""
        if self.weights.transports.groups:
            return "layer_map emd solves for its flow on the host"
        if any(layers.moves for layers in self.maps.values()):
            return "layer_map random draws other layers over the run"
        for name, config in self.losses.terms.items():
            if getattr(config, "temperature_schedule", None) is not None:
                return f"losses.{name}.temperature_schedule is a number of Python"
        return None

    @property
    def moving(self) -> str | None:
        """The first of what a run's steps or epochs change, as its recipe calls it; `None` where
        all stays as it is."""
        for name, config in self.losses.terms.items():
            for field in ("schedule", "temperature_schedule"):
                if getattr(config, field, None) is not None:
                    return f"losses.{name}.{field}"
        moves = any(layers.moves for layers in self.maps.values())
        return "layer_map random" if moves else None

    @property
    def linked(self) -> tuple[object, ...]:
        """The layers that each mapping compares at this moment."""
        return tuple(
            tuple((link.student, link.teachers) for link in checked_links(layers, self.moment))
            for layers in self.maps.values()
        )


class DistilledStudent(nn.Module):
    """Everything that trains: the student and the projections of its objective.

    Under ZeRO-3 parameters are whole only inside the forward of the module that owns them, so it
    captures the student, computes the losses and returns them in one.
    """

    def __init__(self, student: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.compiled: CompiledCapture | None = None
        """What runs the student in steps of the training, where that is compiled."""

    def forward(
        self,
        inputs: Inputs,
        teacher: Capture | None = None,
        shares: Tensor | None = None,
        gather: Gather = alone,
    ) -> tuple[Tensor, Tensor]:
        """Run the student on a micro-batch and, given what the teacher left, compare the two.

        Args:
            inputs: `input_ids` and perhaps `attention_mask`, both [batch, tokens], what else the
                models read, and perhaps `labels`; or a packed row in their place.
            teacher: what the teacher left on the same inputs.
            shares: fp32 [DIVISORS], see `Objective.forward`.
            gather: likewise.

        Returns:
            The total, a scalar, and raw and weighted losses [2, labels], detached. Without a
            teacher the last hidden state [batch, tokens, width] and an empty tensor: under ZeRO-3
            the student can't be run from outside.
        """
        with reading(self.student, inputs) as read:
            if teacher is None or shares is None:
                state = last_hidden_state(self.student, self.student, read)
                return state, state.new_empty(0)
            if self.compiled is not None and self.objective.training:
                states = self.compiled(read)
            else:
                with capture(self.student, **self.objective.layers("student")) as states:
                    self.student(**read)
        # ops choose their own precision, whatever the models run under
        with torch.autocast(shares.device.type, enabled=False):
            total, parts = self.objective(states, teacher, inputs, shares, gather)
        if self.objective.training and torch.is_grad_enabled() and not total.requires_grad:
            raise UserError(
                f"losses: none of {', '.join(self.objective.names)} has a gradient; compute one "
                f"from the student's states, of a student that trains{_RECOMPUTED}"
            )
        return total, parts
