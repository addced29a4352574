"""Models with a classification head for a task: fitted with one, checked for one, named outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from fastkd.capture import set_attention
from fastkd.errors import UserError
from fastkd.models import dropout_rates, not_loadable, read_model, resolve_model
from fastkd.recipe import TunedModel
from fastkd.tasks import Task


@dataclass(frozen=True)
class Tuned:
    """A model that is going to be fine-tuned."""

    model: PreTrainedModel
    new_head: bool
    """Whether its head was drawn."""
    rates: dict[str, float]
    """Its own dropout rates."""


def load_tuned(section: TunedModel, task: Task) -> Tuned:
    """A model to fine-tune, in fp32 on the CPU, with a head for the task.

    A head of the right shape is kept; any other is drawn from torch's random numbers.

    Args:
        section: of the recipe.
        task: whose labels the head gives.

    Raises:
        UserError: it can't be found, read or run with the attention that the recipe names.
    """
    name, given = resolve_model(section.source), f"model {section.name}"
    config = _config(name, section, task, given)
    rates = dropout_rates(config)
    if section.dropout is not None:
        for rate in rates:
            setattr(config, rate, section.dropout)
    model, drawn = read_model(
        name, given, torch.float32, section.revision, "sequence_classification", config
    )
    set_attention(model, section.attention)
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Tuned(model, bool(drawn), rates)


def name_outputs(config: PreTrainedConfig, task: Task) -> None:
    """Write into a configuration what its head's outputs mean."""
    config.problem_type = "regression" if task.regression else "single_label_classification"
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: number for number, label in enumerate(task.labels)}


def check_classifier(model: PreTrainedModel, task: Task, given: str) -> None:
    """See that a model's head answers the task's question.

    Raises:
        UserError: another number of outputs, or the same labels in another order.
    """
    outputs = model.config.num_labels
    if outputs != task.outputs:
        what = "scores of a regression" if task.regression else ", ".join(task.labels)
        raise UserError(
            f"{given}: its head gives {outputs} numbers, but task {task.name} needs "
            f"{task.outputs} ({what}); fine-tune it on this task first"
        )
    names = tuple(str(model.config.id2label.get(number)) for number in range(outputs))
    if set(names) == set(task.labels) and names != task.labels:
        raise UserError(
            f"{given}: its head gives {', '.join(names)}, but task {task.name} counts "
            f"{', '.join(task.labels)}; name task.labels in the order of the model, with columns"
        )


def pad_alike(model: PreTrainedModel, pad_id: int) -> None:
    """Tell a model which token pads: a decoder's head reads the last token before it."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id


def _config(name: str, section: TunedModel, task: Task, given: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=section.revision, trust_remote_code=False, num_labels=task.outputs
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(not_loadable(given, error)) from error
    name_outputs(config, task)
    return config
