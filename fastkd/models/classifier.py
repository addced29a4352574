"""Models with the head of a task: fitted with one, checked for one, named outputs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastkd.capture import set_attention
from fastkd.data.tasks import (
    Task,
    described,
    is_generic,
    order_of,
    same_name,
)
from fastkd.errors import UserError, some_of
from fastkd.models import check_attention, dropout_rates, read_config, read_model, resolve_model
from fastkd.models.student import recompute_blocks
from fastkd.types import ModelSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuned:
    """A model that is going to be fine-tuned."""

    model: PreTrainedModel
    new_head: bool
    """Whether its head was drawn."""
    rates: dict[str, float]
    """Its own dropout rates."""


def load_tuned(
    source: ModelSource,
    task: Task,
    *,
    dropout: float | None = None,
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
) -> Tuned:
    """A model to fine-tune, in fp32 on the CPU, with a head for the task.

    A head of the right shape is kept, its outputs in the task's order where their names are the
    task's; any other is drawn from torch's random numbers.

    Args:
        source: where it is loaded from.
        task: whose labels the head gives.
        dropout: every rate; the model's own where `None`.
        attention: implementation that it runs.
        gradient_checkpointing: recompute blocks in the backward pass.

    Raises:
        UserError: it can't be found, read or run with that attention.
    """
    name, given = resolve_model(source), f"model {source.name}"
    config = read_config(name, given, source.revision, num_labels=task.outputs)
    rates = dropout_rates(config)
    if dropout is not None:
        for rate in rates:
            setattr(config, rate, dropout)
    check_attention("model", attention, dropout_rates(config))
    model, drawn = read_model(name, given, torch.float32, source.revision, task.kind, config)
    order = order_of(_names(model.config), task)
    if order is not None:
        _reorder(model, order, given)
    name_outputs(model.config, task)
    set_attention(model, attention)
    if gradient_checkpointing:
        recompute_blocks(model)
    return Tuned(model, bool(drawn), rates)


def name_outputs(config: PreTrainedConfig, task: Task) -> None:
    """Write into a configuration what its head's outputs mean: they are the task's, in its order.

    Names that say more than a number and mean the task's labels stay as they are.
    """
    problem = _problem_type(task)
    if problem is not None:
        config.problem_type = problem
    if not task.labels:
        return
    names = _names(config)
    own = not is_generic(names) and order_of(names, task) == tuple(range(len(names)))
    _write_names(config, names if own else task.labels)


def fit_classifier(model: PreTrainedModel, task: Task, given: str) -> None:
    """See that a model's head answers the task's question, and give its outputs the task's order.

    Args:
        model: with the task's head; the rows of its last layer change places.
        task: whose labels the head gives.
        given: what the user calls the model.

    Raises:
        UserError: another number of outputs, outputs whose names are not the task's labels, or
            outputs in another order that can't be changed.
    """
    config = model.config
    if config.num_labels != task.outputs:
        what = "scores of a regression" if task.regression else some_of(task.labels)
        what = what or "the first and the last token of an answer"
        raise UserError(
            f"{given}: its head gives {config.num_labels} numbers, but task {task.name} needs "
            f"{task.outputs} ({what}); fine-tune it on this task first"
        )
    problem = _problem_type(task)
    if problem is not None and config.problem_type not in (None, problem):
        raise UserError(
            f"{given}: its problem_type is {config.problem_type}, but task {task.name} needs "
            f"{problem}; fine-tune it on this task first"
        )
    if not task.labels:
        return
    names = _names(config)
    order = order_of(names, task)
    if order is None and not is_generic(names):
        raise UserError(
            f"{given}: its head gives {', '.join(names)}, but task {task.name} counts "
            f"{described(task)}; say which is which by the names in its config.json (id2label) or, "
            "of a task with columns, by task.meanings"
        )
    if order is not None:
        _reorder(model, order, given)


def follow_labels(model: PreTrainedModel, first: PreTrainedConfig, given: str) -> None:
    """Give a head's outputs the order of another model's, by what both call them.

    Args:
        model: whose head gives as many; the rows of its last layer change places.
        first: the other model's configuration.
        given: what the user calls the model.

    Raises:
        UserError: names that are not the other's, a head for another kind of labels, or outputs in
            another order that can't be changed.
    """
    if model.config.num_labels == 1:
        return
    kinds = model.config.problem_type, first.problem_type
    if None not in kinds and kinds[0] != kinds[1]:
        raise UserError(
            f"{given}: its problem_type is {kinds[0]}, but the first teacher's {kinds[1]}; give "
            "teachers of one task"
        )
    names, wanted = _names(model.config), _names(first)
    if is_generic(names) or is_generic(wanted):
        if not (is_generic(names) and is_generic(wanted)):
            logger.warning(
                "%s: its outputs are called %s, the first teacher's %s; taken to be of one order",
                *(given, ", ".join(names), ", ".join(wanted)),
            )
        return
    places = {same_name(name): place for place, name in enumerate(names)}
    order = [places.get(same_name(name), -1) for name in wanted]
    if sorted(order) != list(range(len(names))):
        raise UserError(
            f"{given}: its head gives {', '.join(names)}, but the first teacher's "
            f"{', '.join(wanted)}; say which is which by the names in its config.json (id2label)"
        )
    _reorder(model, order, given)


def check_same_outputs(student: PreTrainedConfig, teacher: PreTrainedConfig, name: str) -> None:
    """See that two heads give the same outputs in the same order, by what both call them.

    Args:
        student: whose head learns.
        teacher: whose head it learns from.
        name: the loss that compares them.

    Raises:
        UserError: another number, another kind of labels, or other names at the same places.
    """
    if student.num_labels != teacher.num_labels:
        raise UserError(
            f"losses.{name} compares the outputs of both heads, but the student's gives "
            f"{student.num_labels} numbers and the teacher's {teacher.num_labels}; give models of "
            "one task (num_labels)"
        )
    kinds = student.problem_type, teacher.problem_type
    if None not in kinds and kinds[0] != kinds[1]:
        raise UserError(
            f"losses.{name} compares the outputs of both heads, but the student's problem_type is "
            f"{kinds[0]} and the teacher's {kinds[1]}; give models of one task"
        )
    names = _names(student), _names(teacher)
    spelled = [[same_name(one) for one in each] for each in names]
    # names that are but numbers say nothing
    if student.num_labels > 1 and spelled[0] != spelled[1] and not any(map(is_generic, names)):
        raise UserError(
            f"losses.{name} compares the outputs of both heads one by one, but the student's are "
            f"called {', '.join(names[0])} and the teacher's {', '.join(names[1])}; give heads of "
            "one order, with one set of names in their config.json (id2label)"
        )


def check_start(source: ModelSource, task: Task) -> None:
    """See that a model to start from counts the task's labels as the task does.

    Args:
        source: what `student.init` names.
        task: whose labels the head gives.

    Raises:
        UserError: it can't be read, or gives them in another order.
    """
    if not task.labels:
        return
    given = f"student.init {source.name}"
    names = _names(read_config(resolve_model(source), given))
    order = order_of(names, task)
    if order is not None and order != tuple(range(len(order))):
        raise UserError(
            f"{given}: its head gives {', '.join(names)}, but task {task.name} counts "
            f"{described(task)}; start from a student of this order"
        )


def _reorder(model: PreTrainedModel, order: Sequence[int], given: str) -> None:
    """Let output i of a model be what output `order[i]` was."""
    if list(order) == sorted(order):
        return
    names = _names(model.config)
    below = {id(module) for module in model.base_model.modules()}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.out_features == len(order)
        and id(module) not in below
    ]
    if len(layers) != 1:
        raise UserError(
            f"{given}: its head gives {', '.join(names)}, which is not the order wanted, and has "
            f"{len(layers)} layers that could be its last; give a model of the other order"
        )
    with torch.no_grad():
        for weight in layers[0].parameters():
            weight.copy_(weight[list(order)].clone())
    _write_names(model.config, [names[place] for place in order])


def _names(config: PreTrainedConfig) -> tuple[str, ...]:
    """What a configuration calls its outputs, in order."""
    return tuple(str(config.id2label.get(number)) for number in range(config.num_labels))


def _write_names(config: PreTrainedConfig, names: Sequence[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def _problem_type(task: Task) -> str | None:
    """What a configuration says of a head for texts; `None` of a head for tokens."""
    if task.labels_of != "example":
        return None
    return "regression" if task.regression else "single_label_classification"
