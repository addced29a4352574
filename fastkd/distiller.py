"""The losses for a loop of one's own: `Distiller`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.batch_check import BatchCheck
from fastkd.capture import AttentionTraits, CompiledCapture, evaluating, is_routed, try_model
from fastkd.capture.compiled import check_not_compiled
from fastkd.capture.lm_head import head_traits
from fastkd.capture.modes import shared
from fastkd.capture.routing import routed
from fastkd.capture.sharding import check_not_sharded, check_sharding, check_whole_heads
from fastkd.errors import UserError
from fastkd.layer_map import Progress, follows_epochs, make_layer_map
from fastkd.layer_map.sections import Layers
from fastkd.losses import DIVISORS
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
from fastkd.training.teacher import TeacherRunner
from fastkd.training.usual_modes import usual_modes
from fastkd.types import Head, Inputs

_EXAMPLES = DIVISORS.index("examples")


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
        traits, self._routed = _tried(student, teacher, tokens, needs)
        # those of GPUs are the caller's: nothing here is drawn there
        with usual_modes(), torch.random.fork_rng(devices=[]):
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
        self._rates_unread = bool(objective.parameter_rates())
        self._unmoved = objective.moving
        self._by_epoch = any(map(follows_epochs, objective.maps.values()))
        parts = objective.all_layers("student")["logits"]
        # the models whose logits are made here, and what was tried of their last layers
        self._heads = [(m, head_traits(m)) for m in (student, teacher) if parts]
        self._batch_check = BatchCheck(
            student,
            teacher,
            head,
            tried=tokens if needs["attention"] else None,
            reader=_label_reader(section, head),
        )
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
        return self._batch_check.needs_labels

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

    def __getstate__(self) -> dict[str, Any]:
        # what hears the models is theirs, and no copy's
        if self._listening:
            raise UserError(
                "the distiller is listening, so it can't be copied or pickled; do so outside of "
                "`with distiller:`, or copy distiller.student, which can be at any time"
            )
        return self.__dict__

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
        return self.objective.divisors(self._batch_check(batch)).clone()

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
        inputs = self._batch_check(batch)
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


def _tried(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: int, needs: Mapping[str, bool]
) -> tuple[tuple[AttentionTraits, AttentionTraits], list[PreTrainedModel]]:
    """What the queries of both models see, and the models that can run routed; both are left as
    they were."""
    models = student, teacher
    running = [model.config._attn_implementation for model in models]
    try:
        traits = (
            try_model(student, tokens, "tokens", **needs),
            try_model(teacher, tokens, "tokens", **needs),
        )
        return traits, [model for model in models if is_routed(model)]
    finally:
        for model, name in zip(models, running, strict=True):
            model.config._attn_implementation = name


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


def _label_reader(losses: Losses, head: Head) -> str | None:
    """Name of the first loss that learns from labels, or where they are."""
    for name, config in losses.terms.items():
        kind = loss_class(config.loss)
        if issubclass(kind, HeadLoss) and kind.reads_labels(head):
            return name
    return None


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
