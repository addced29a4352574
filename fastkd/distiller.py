"""The losses for a loop of one's own: `Distiller`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from inspect import signature
from types import TracebackType
from typing import Any, Literal, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture import CompiledCapture, evaluating, is_routed, try_model, vocabulary_size
from fastkd.capture.compiled import check_not_compiled
from fastkd.capture.lm_head import head_traits
from fastkd.capture.modes import shared
from fastkd.capture.routing import routed
from fastkd.capture.sharding import check_not_sharded, check_sharding, check_whole_heads
from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.layer_map import Progress, follows_epochs, make_layer_map
from fastkd.layer_map.sections import Layers
from fastkd.losses import DIVISORS, model_inputs
from fastkd.losses.base import Setting
from fastkd.losses.factory import (
    capture_needs,
    compared_outputs,
    embedding_losses,
    make_objective,
)
from fastkd.losses.heads import HeadLoss
from fastkd.losses.objective import DistilledStudent
from fastkd.losses.registry import loss_class
from fastkd.models import head_of_classes
from fastkd.models.classifier import check_same_outputs
from fastkd.plugins import plugin_errors
from fastkd.recipe import Losses, complain
from fastkd.section import Section
from fastkd.training.engine import TeacherRunner
from fastkd.types import IGNORE_INDEX, Head, Inputs

_EXAMPLES = DIVISORS.index("examples")


_WINDOWS = ("sliding_window", "local_attention", "attention_chunk_size", "window_size")
"""What configurations call the tokens that local attention sees."""


class Distiller(nn.Module):
    """What a student loses against a teacher, for any loop, optimiser and launcher.

        distiller = Distiller(student, teacher, {"attention": {}, "hidden": {}})
        optimizer = torch.optim.AdamW(distiller.parameters())
        with distiller:
            for batch in batches:
                loss, parts = distiller(batch)
                loss.backward()
                ...
        student.save_pretrained("student")

    Its parameters are the student's and the projections from student to teacher width: give
    `distiller.parameters()` to the optimiser, not the student's alone; `parameter_groups()` where
    projections have a learning rate of their own. The teacher is no submodule:
    it is in no `parameters()` or `state_dict()`, gets no gradient, and follows the student to its
    device.

    `with distiller:` lets the attention of both models be heard (it runs as before, to the same
    bits) and puts the teacher into eval mode; at its end both models are as they were. Everything
    outside, such as saving, evaluating or loading, works in the context and without.

    A loss is a mean over what it is defined on: query-key pairs, tokens, examples or labels. By
    default that mean is over the batch. Where an optimiser step has several micro-batches or ranks,
    means of means weigh short batches too much; for the exact mean over the step count first:

        counts = sum(distiller.count(batch) for batch in micro_batches)    # and over ranks
        for batch in micro_batches:
            loss, parts = distiller(batch, counts=counts)
            loss.backward()

    What adds gradients up (as here) needs no more. What averages them, as DDP does over its ranks
    and `accelerate` over accumulated batches, is told over how many: `pieces=world_size`.
    DDP wraps the distiller itself, `DDP(distiller, find_unused_parameters=True)`: a student may
    have weights that no loss reads, such as those above the last mapped layer. So does FSDP2:
    `fully_shard(layer)` for layers of the student, then `fully_shard(distiller)`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        losses: Losses | Mapping[str, Any],
        layer_map: Layers | list[int] | Mapping[str, Any] = "uniform",
        *,
        tokens: int = 8,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        """See that the losses can be computed for two models; both are left as they were.

        Args:
            student: to be trained; its attention must go through transformers' interface where it
                is matched.
            teacher: to learn from, frozen by `teacher.requires_grad_(False)`.
            losses: as the section `losses` of a recipe, such as `{"hidden": {"weight": 10}}`.
            layer_map: as in a recipe: a word, a mapping with options, or a list of teacher layers.
            tokens: length of the sequences that both models are tried on. What their attention
                hides of longer ones is not seen: a batch beyond it of a model with windows is
                refused.
            seed: of a random mapping, and of the projections.
            compile: whether both models run under `torch.compile` while the distiller is in
                training mode; give them as they are, not compiled.

        Raises:
            UserError: two models or losses that don't fit together, or a teacher that trains.
        """
        super().__init__()
        _check_models(student, teacher)
        given = _given(losses, layer_map)
        section = given.losses
        head = _common_head(student, teacher)
        _check_head(section, head)
        _check_pooling(section, head)
        for name in compared_outputs(section, head):
            check_same_outputs(student.config, teacher.config, name)
        depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        layers = make_layer_map(given.layer_map, *depths, seed=seed)
        needs = capture_needs(section)
        if needs["attention"]:
            check_whole_heads(teacher)
        running = [model.config._attn_implementation for model in (student, teacher)]
        try:
            traits = (
                try_model(student, tokens, "tokens", **needs),
                try_model(teacher, tokens, "tokens", **needs),
            )
            heard = [model for model in (student, teacher) if is_routed(model)]
        finally:
            for model, name in zip((student, teacher), running, strict=True):
                model.config._attn_implementation = name
        # those of GPUs are the caller's: nothing here is drawn there
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            objective = make_objective(
                section, layers, student, teacher, traits, head=head, seed=seed
            )
        if objective.weights.adapts:
            raise UserError(
                "losses.balance ratio and layer_map emd follow the losses of whole steps, which a "
                "Distiller does not see; give other ones, or use fastkd.distill"
            )
        self.student = student
        # in half precision an optimiser would round most updates of projections away
        dtype = torch.promote_types(student.dtype, torch.float32)
        self.objective = objective.to(student.device, dtype)
        # no submodules: a list hides them from parameters() and state_dict()
        self._teacher = [teacher]
        self._pair = [DistilledStudent(student, objective)]
        self._runs: list[TeacherRunner] = []
        self._compiled = self._compile() if compile else None
        self._routed = heard
        of_heads = ((n, loss_class(c.loss)) for n, c in section.terms.items())
        # the loss that learns from labels, or where they are
        self._labels_read = next(
            (n for n, kind in of_heads if issubclass(kind, HeadLoss) and kind.reads_labels(head)),
            None,
        )
        self._rates_unread = bool(objective.parameter_rates())
        self._unmoved = objective.moving
        self._by_epoch = any(map(follows_epochs, objective.maps.values()))
        parts = objective.all_layers("student")["logits"]
        # the models whose logits are made here, and what was tried of their last layers
        self._heads = [(m, head_traits(m)) for m in (student, teacher) if parts]
        self._tokens = tokens if needs["attention"] else None
        self._rows = vocabulary_size(student), vocabulary_size(teacher)
        self._keywords = [set(signature(model.forward).parameters) for model in (student, teacher)]
        self._listening: list[ExitStack] = []
        # `fully_shard` gives what it shards another class
        self._kinds: tuple[type, type] | None = None

    @property
    def teacher(self) -> PreTrainedModel:
        """The model that it learns from."""
        return self._teacher[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the losses, as in `attention/1-2`: the keys of `parts`."""
        return self.objective.labels

    @property
    def needs_labels(self) -> bool:
        """Whether a loss reads labels that a batch must hold; a causal model's are its ids where
        not given."""
        of = HEADS[self.objective.pair.head].labels
        return self._labels_read is not None and of != "next_token"

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All parameters, for an optimiser: `{"params": [...]}` first, then for each
        `projection_learning_rate` a group with that as its `lr`."""
        self._rates_unread = False
        rates = self.objective.parameter_rates()
        own = {p: rates[n] for n, p in self.objective.named_parameters() if n in rates}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.parameters() if p not in own]}]
        for rate in sorted(set(own.values())):
            groups.append({"params": [p for p in own if own[p] == rate], "lr": rate})
        return groups

    def __enter__(self) -> Self:
        # other distillers may listen to the same teacher
        with ExitStack() as opening:
            for model in self._routed:
                heard = shared(model.config, partial(routed, model), "attention")
                opening.enter_context(heard)
            modes = shared(self.teacher, partial(evaluating, self.teacher), "modes")
            opening.enter_context(modes)
            self._listening.append(opening.pop_all())
        self._runs.append(TeacherRunner(self.teacher, self.objective))
        self._kinds = None
        if self._compiled is not None:
            if len(self._runs) == 1:
                for recorded in self._compiled:
                    recorded.open()
            self._pair[0].compiled, self._runs[-1].compiled = self._compiled
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> Literal[False]:
        self._runs.pop()
        if self._compiled is not None and not self._runs:
            for recorded in self._compiled:
                recorded.close()
            self._pair[0].compiled = None
        self._listening.pop().close()
        return False

    def _compile(self) -> tuple[CompiledCapture, CompiledCapture]:
        student = CompiledCapture(self.student, self.objective.all_layers("student"))
        return student, CompiledCapture(self.teacher, self.objective.all_layers("teacher"))

    def at(self, step: int, steps: int, epoch: int | None = None) -> None:
        """Move schedules and random mappings to a step, counted from 0, of so many.

        Args:
            step: optimiser steps that are done.
            steps: of the whole run.
            epoch: passes over the data that are done, which random mappings are drawn by.

        Raises:
            UserError: a step that is none of them, or no epoch where a mapping follows it.
        """
        if not 0 <= step <= steps or steps < 1:
            raise UserError(f"step {step} of {steps}: expected 0 to steps, and steps above 0")
        if epoch is None:
            if self._by_epoch:
                raise UserError(
                    "a layer_map is drawn anew every epoch, and at was told of none; give "
                    "distiller.at(step, steps, epoch), the passes over the data that are done"
                )
            epoch = 0
        self._unmoved = None
        self.objective.steps = steps
        self.objective.at(Progress(step, epoch))

    def count(self, batch: Inputs) -> Tensor:
        """What a batch holds of everything that losses are means over, to be added up: fp64 [6].

        On the batch's device; in the order of `fastkd.losses.DIVISORS`.
        """
        return self.objective.divisors(self._checked(batch)).clone()

    def forward(
        self, batch: Inputs, counts: Tensor | None = None, pieces: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run both models on a batch and compare them; losses that compare rows with each other
        (`rkd`, `similarity`, ...) compare those of this batch.

        Args:
            batch: `input_ids` [batch, tokens], where padded `attention_mask` of that shape, what
                else both models read, and `labels` where a loss reads them: one an example for
                classifiers, one a token for language models (-100 counts nowhere, in `logits` as
                in `labels`; those of causal models are shifted here, and are the ids where not
                given).
            counts: sum of `count` over all batches of the step; of this batch where not given.
            pieces: over how many losses their gradients are averaged afterwards.

        Returns:
            The loss, to call `backward` on, and the raw losses by label, detached. Both are this
            batch's part of the step's means, times `pieces`.

        Raises:
            UserError: a batch that lacks what is read, no context is open, learning rates that no
                optimiser was told, losses that change over the run and `at` was not called, or a
                model that was changed.
        """
        inputs = self._checked(batch)
        if not self._listening:
            raise UserError("the distiller is not listening; call it inside `with distiller:`")
        if self.training and torch.is_grad_enabled():
            self._check_told()
        self._check_same()
        own = self.objective.divisors(inputs)
        whole = own if counts is None else counts.to(own)
        # what counts nothing has no share, and divides by nothing
        shares = own / whole.clamp(min=1) * pieces
        self._follow(inputs["input_ids"].device)
        teacher_states = self._runs[-1](inputs)
        total, values = self._pair[0](inputs, teacher_states, shares.float())
        if self.objective.uncertainty is not None:
            # the log-variances stand in the total of every batch, and count once a step
            alone = self.objective.variance_total()
            total = total + (shares[_EXAMPLES].to(alone) - 1) * alone
        return total, dict(zip(self.labels, values[0].unbind(), strict=True))

    def _check_told(self) -> None:
        """See that a step which trains knows where the run is, and an optimiser its rates.

        Raises:
            UserError: what to call first.
        """
        if self._rates_unread:
            raise UserError(
                "losses have a projection_learning_rate, which the optimiser was not told; make it "
                "from distiller.parameter_groups(), or leave projection_learning_rate out"
            )
        if self._unmoved is not None:
            raise UserError(
                f"{self._unmoved} changes over the run, and the distiller was not told where it "
                "is; call distiller.at(step, steps, epoch) before each step"
            )

    def _check_same(self) -> None:
        """See that the models are those that were tried.

        Raises:
            UserError: there is another student, one that was sharded alone, or a last layer that
                was changed.
        """
        if self._pair[0].student is not self.student:
            raise UserError(
                "distiller.student is not the model that the distiller was made for; make a new "
                "Distiller for it"
            )
        kinds = type(self), type(self.student)
        if kinds != self._kinds:
            check_sharding(self, self.student, self.objective.all_layers("student"))
            self._kinds = kinds
        for model, tried in self._heads:
            if head_traits(model) != tried:
                raise UserError(
                    f"the last layer of {type(model).__name__} was changed since the distiller was "
                    "made (another layer, or adapters), and its logits may not be those of weight "
                    "and bias; make a new Distiller"
                )

    def _follow(self, device: torch.device) -> None:
        teacher = self.teacher
        # one that is spread over devices stays there
        if teacher.device != device and getattr(teacher, "hf_device_map", None) is None:
            teacher.to(device)

    def _check_length(self, tokens: int) -> None:
        """See that what attention hides of so many tokens was tried.

        Raises:
            UserError: a window that the trial was too short to show.
        """
        if self._tokens is None or tokens <= self._tokens:
            return
        for model in (self.student, self.teacher):
            config = model.config.get_text_config()
            for field in _WINDOWS:
                width = getattr(config, field, None)
                # one more than the width may be seen, where it counts both sides apart
                if isinstance(width, int) and self._tokens - 1 <= width < tokens:
                    raise UserError(
                        f"the batch has {tokens} tokens, of which {type(model).__name__} may hide "
                        f"some ({field} {width}), but both models were tried on {self._tokens}; "
                        f"give Distiller(tokens={tokens}), or the most that any batch has"
                    )

    def _check_ids(self, ids: Tensor) -> None:
        """See that both models embed the ids, where one has more rows; on a GPU, where a look would
        wait for all work before it, the smaller table's own lookup fails.

        Raises:
            UserError: naming an id that one model doesn't embed.
        """
        rows = min(self._rows)
        if rows == max(self._rows) or ids.device.type != "cpu" or not ids.numel():
            return
        largest = int(ids.max())
        if largest >= rows:
            side = "student" if self._rows[0] == rows else "teacher"
            raise UserError(
                f"the batch holds the id {largest}, but the {side} embeds {rows} tokens (student "
                f"and teacher: {self._rows[0]} and {self._rows[1]}); give ids that both embed"
            )

    def _checked(self, batch: Inputs) -> Inputs:
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
        sides = ("student", self.student), ("teacher", self.teacher)
        for (side, model), known in zip(sides, self._keywords, strict=True):
            strange = [str(key) for key in batch if key != "labels" and key not in known]
            if strange:
                raise UserError(
                    f"the {side} {type(model).__name__} reads no {', '.join(strange)}; take it out "
                    "of the batch: both models read the same"
                )
        return self._labelled(batch)

    def _labelled(self, batch: Inputs) -> Inputs:
        """The batch with the labels that losses read, or without any.

        Raises:
            UserError: none, or of another shape than the head's outputs.
        """
        reader, head = self._labels_read, self.objective.pair.head
        labels, ids = batch.get("labels"), batch["input_ids"]
        of = HEADS[head].labels
        # the first token of a span and the last one
        shape = ids.shape[:1] if of == "example" else (len(ids), 2) if of == "span" else ids.shape
        if isinstance(labels, Tensor) and labels.shape == shape:
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


def _check_models(student: object, teacher: object) -> None:
    for side, model in (("student", student), ("teacher", teacher)):
        if isinstance(model, nn.Module) and hasattr(model, "_orig_mod"):
            raise UserError(
                f"the {side} is compiled, and what is captured of it would be left out; give it as "
                "it was before torch.compile, and compile=True"
            )
        if not isinstance(model, PreTrainedModel):
            raise UserError(
                f"the {side} is a {type(model).__name__}, expected a model of transformers"
            )
    assert isinstance(student, PreTrainedModel) and isinstance(teacher, PreTrainedModel)
    for model in (student, teacher):
        check_not_compiled(model)
    check_not_sharded(student)
    training = [name for name, p in teacher.named_parameters() if p.requires_grad]
    if training:
        raise UserError(
            f"the teacher has {len(training)} parameters with gradients, such as {training[0]}, "
            "expected none; call teacher.requires_grad_(False), and see that student and teacher "
            "stand in this order"
        )
    shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
    if shared:
        raise UserError(
            f"student and teacher share {len(shared)} parameters; give two models of their own"
        )
    depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    if depths[0] > depths[1]:
        raise UserError(
            f"the student has {depths[0]} layers and the teacher {depths[1]}; give a student that "
            "is not deeper"
        )


class _Given(Section):
    """What the caller says, as a recipe would."""

    losses: Losses
    layer_map: Layers = "uniform"


def _given(losses: object, layer_map: object) -> _Given:
    try:
        return _Given.model_validate({"losses": losses, "layer_map": layer_map})
    except ValidationError as error:
        raise UserError(complain(error, _Given)) from error


def _head_of(model: PreTrainedModel) -> Head:
    return head_of_classes({kind.__name__ for kind in type(model).__mro__})


def _common_head(student: PreTrainedModel, teacher: PreTrainedModel) -> Head:
    heads = _head_of(student), _head_of(teacher)
    # what stands on a model is only read where both have it
    return heads[0] if heads[0] == heads[1] else "none"


def _check_pooling(losses: Losses, head: Head) -> None:
    """See that losses of embeddings say how these are made: no folder says it here.

    Raises:
        UserError: one doesn't.
    """
    for name, config in embedding_losses(losses, head).items():
        if config.pooling is None:
            raise UserError(
                f"losses.{name}.pooling is not given, and a Distiller sees two transformers alone, "
                "not the modules that their folders have behind them; give mean, cls or last"
            )


def _check_head(losses: Losses, head: Head) -> None:
    on = frozenset(config.loss for config in losses.terms.values())
    setting = Setting(head, True, on, field="the head that both models have")
    for name, config in losses.terms.items():
        kind = loss_class(config.loss)
        try:
            with plugin_errors(f"losses.{name}", kind, agreed=ValueError):
                kind.check_setting(name, config, setting)
        except ValueError as error:
            raise UserError(str(error)) from error
