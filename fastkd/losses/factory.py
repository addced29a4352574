"""From a recipe's losses and two models to the objective that compares them."""

from __future__ import annotations

from transformers import PreTrainedModel

from fastkd.capture import AttentionTraits
from fastkd.errors import UserError
from fastkd.layer_map import LayerMap, make_layer_map
from fastkd.losses.base import ModelPair
from fastkd.losses.objective import Objective
from fastkd.recipe import LabelsLoss, Losses
from fastkd.types import Head


def capture_needs(losses: Losses) -> dict[str, bool]:
    """What a model must let be captured, as keyword arguments of `try_model`."""
    return {
        "attention": losses.attention is not None or losses.relations is not None,
        "hidden": losses.hidden is not None or losses.embedding is not None,
    }


def make_objective(
    losses: Losses,
    layers: LayerMap,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    traits: tuple[AttentionTraits, AttentionTraits],
    *,
    head: Head = "none",
    seed: int = 0,
    steps: int = 1,
) -> Objective:
    """The objective of some losses for two models.

    Args:
        losses: what is matched.
        layers: the mapping of losses that have none of their own.
        student: to be trained.
        teacher: to learn from.
        traits: what trying the two models showed, the student's first.
        head: what stands on the blocks of both.
        seed: of the draws of a random mapping that names none.
        steps: optimiser steps of the run, which schedules are stretched over.

    Raises:
        UserError: the models don't fit together.
    """
    heads = student.config.num_attention_heads, teacher.config.num_attention_heads
    if losses.attention and heads[0] != heads[1]:
        raise UserError(
            f"losses.attention compares heads one by one, but the student has {heads[0]} and the "
            f"teacher {heads[1]}; set student.heads={heads[1]}, or leave the term out"
        )
    _check_traits(losses, traits)
    pair = ModelPair(
        widths=(student.config.hidden_size, teacher.config.hidden_size),
        causal=traits[1].causal,
        heads=heads,
        shapes=(traits[0].shapes, traits[1].shapes),
        sinks=(traits[0].sinks, traits[1].sinks),
        windows=(traits[0].windows, traits[1].windows),
        head=head,
        outputs=teacher.config.num_labels,
    )
    depths = layers.student_layers, layers.teacher_layers
    own = {
        name: make_layer_map(given, *depths, seed=seed)
        for name, term in losses.terms.items()
        if (given := getattr(term, "layer_map", None)) is not None
    }
    return Objective(losses, layers, pair, own_layers=own, steps=steps)


def hard_objective(model: PreTrainedModel, steps: int) -> tuple[Objective, LayerMap]:
    """The objective of a fine-tuning run, hard labels alone, and a map that it doesn't use."""
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    layers = make_layer_map("uniform", depth, depth)
    pair = ModelPair(
        widths=(width, width), head="sequence_classification", outputs=model.config.num_labels
    )
    return Objective(Losses(labels=LabelsLoss()), layers, pair, steps=steps), layers


def _check_traits(losses: Losses, traits: tuple[AttentionTraits, AttentionTraits]) -> None:
    """See that two models attend in a way that the recipe's losses can compare."""
    compares = losses.attention is not None and losses.attention.kind != "score_mse"
    if traits[0].causal != traits[1].causal and (losses.attention or losses.relations):
        kinds = ["causal" if found.causal else "bidirectional" for found in traits]
        raise UserError(
            f"the student is {kinds[0]} and the teacher {kinds[1]}, so their attention can't be "
            "compared; leave losses.attention and losses.relations out"
        )
    for found in traits:
        if found.unknown and (compares or losses.relations):
            raise UserError(
                f"{found.unknown}; give losses.attention the kind score_mse, and leave "
                "losses.relations out"
            )
        if found.differs and compares:
            raise UserError(
                f"{found.differs}, so probabilities can't be compared; give losses.attention the "
                "kind score_mse, or take losses.relations in its place"
            )
