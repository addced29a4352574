"""From a recipe's losses and two models to the objective that compares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd.capture import find_module
from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.layer_map import LayerMap, foresee, make_layer_map
from fastkd.losses.base import ModelPair, Term
from fastkd.losses.ensemble import Ensemble
from fastkd.losses.heads import HardLoss
from fastkd.losses.objective import Objective
from fastkd.losses.pooling import EmbeddingModules
from fastkd.losses.registry import loss_class
from fastkd.losses.sequence_embeddings import SequenceEmbeddingConfig, SequenceEmbeddingLoss
from fastkd.losses.term_errors import key_of
from fastkd.plugins import plugin_errors
from fastkd.recipe import Losses
from fastkd.types import Head, Side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastkd.capture import AttentionTraits


def capture_needs(losses: Losses) -> dict[str, bool]:
    """What a model must let be captured, as keyword arguments of `try_model`."""
    captures = [loss_class(config.loss).captures for config in losses.terms.values()]
    return {
        "attention": any(one.attention for one in captures),
        "hidden": any(one.hidden for one in captures),
        "outputs": any(one.outputs for one in captures),
    }


def embedding_losses(losses: Losses, head: Head) -> dict[str, SequenceEmbeddingConfig]:
    """The losses that compare embeddings of models with a head, by their names in the recipe."""
    found = {}
    for name, config in losses.terms.items():
        kind = loss_class(config.loss)
        reads = issubclass(kind, SequenceEmbeddingLoss) and kind.reads_embeddings(head)
        if reads and isinstance(config, SequenceEmbeddingConfig):
            found[name] = config
    return found


def compares_directions(losses: Losses, head: Head) -> bool:
    """Whether losses compare embeddings, and none reads their lengths."""
    found = embedding_losses(losses, head).values()
    return bool(found) and not any(config.reads_lengths for config in found)


def score_losses(losses: Losses, head: Head) -> list[str]:
    """The losses that compare what classification heads give of a text, by their names."""
    if HEADS[head].labels != "example":
        return []
    found = []
    for name, config in losses.terms.items():
        kind = loss_class(config.loss)
        scores = issubclass(kind, SequenceEmbeddingLoss) and not kind.reads_embeddings(head)
        if scores or kind.captures.logits:
            found.append(name)
    return found


def compared_outputs(losses: Losses, head: Head) -> list[str]:
    """The losses that compare the outputs of two classification heads one by one, by their names in
    the recipe."""
    if HEADS[head].data != "task":
        return []
    kinds = {name: loss_class(config.loss) for name, config in losses.terms.items()}
    return [n for n, k in kinds.items() if k.captures.logits and not issubclass(k, HardLoss)]


def token_losses(losses: Losses, head: Head) -> list[str]:
    """The losses that need models of one vocabulary, by their names in the recipe."""
    found = losses.terms.items()
    return [name for name, config in found if loss_class(config.loss).compares_tokens(head)]


def make_objective(
    losses: Losses,
    layers: LayerMap,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    traits: tuple[AttentionTraits, AttentionTraits],
    *,
    head: Head = "none",
    row: tuple[str, ...] = (),
    seed: int = 0,
    steps: int = 1,
    embeddings: tuple[EmbeddingModules, EmbeddingModules] | None = None,
    ensemble: Ensemble | None = None,
    last_is_output: bool = False,
) -> Objective:
    """The objective of some losses for two models.

    Args:
        losses: what is matched.
        layers: the mapping of losses that have none of their own.
        student: to be trained.
        teacher: to learn from.
        traits: what trying the two models showed, the student's first.
        head: what stands on the blocks of both.
        row: what each of the sequences of a row is, see `ModelPair`; one text where not given.
        seed: of the draws of a random mapping that names none.
        steps: optimiser steps of the run, which schedules are stretched over.
        embeddings: what makes embeddings of each model, as of `ModelPair`.
        ensemble: what several teachers come to, of which `teacher` is the first.
        last_is_output: as of `ModelPair`.

    Raises:
        UserError: the models don't fit together.
    """
    heads = student.config.num_attention_heads, teacher.config.num_attention_heads
    for name, config in losses.terms.items():
        kind = loss_class(config.loss)
        with plugin_errors(f"losses.{name}", kind):
            kind.check_models(name, config, heads, traits)
    pair = ModelPair(
        widths=(student.config.hidden_size, teacher.config.hidden_size),
        causal=traits[1].causal,
        heads=heads,
        shapes=(traits[0].shapes, traits[1].shapes),
        sinks=(traits[0].sinks, traits[1].sinks),
        windows=(traits[0].windows, traits[1].windows),
        head=head,
        outputs=teacher.config.num_labels,
        no_classes=(_no_classes(student, head), _no_classes(teacher, head)),
        embeddings=embeddings,
        row=row or ("text",),
        ensemble=ensemble,
        last_is_output=last_is_output,
    )
    depths = layers.student_layers, layers.teacher_layers
    own = {
        name: make_layer_map(given, *depths, seed=seed)
        for name, term in losses.terms.items()
        if (given := getattr(term, "layer_map", None)) is not None
    }
    for each in (layers, *own.values()):
        foresee(each, steps)
    objective = Objective(losses, layers, pair, own_layers=own, steps=steps)
    for term in objective.each():
        _check_modules(term, student, "student")
        _check_modules(term, teacher, "teacher")
    return objective


def _no_classes(model: PreTrainedModel, head: Head) -> str | None:
    """What a configuration calls the numbers of a head for texts that has no softmax."""
    if HEADS[head].labels != "example":
        return None
    problem: str | None = model.config.problem_type
    several = problem == "regression" and model.config.num_labels > 1
    return problem if several or problem == "multi_label_classification" else None


def _check_modules(term: Term, model: PreTrainedModel, side: Side) -> None:
    """See that a model has the modules that a term reads."""
    for path in sorted(term.layers(side).get("modules", ())):
        try:
            find_module(model, path)
        except UserError as error:
            raise UserError(f"{key_of(term)}: {error}") from error


def hard_objective(model: PreTrainedModel, head: Head, steps: int) -> tuple[Objective, LayerMap]:
    """The objective of a fine-tuning run, hard labels alone, and a map that it doesn't use."""
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    layers = make_layer_map("uniform", depth, depth)
    outputs, none = model.config.num_labels, _no_classes(model, head)
    pair = ModelPair(widths=(width, width), head=head, outputs=outputs, no_classes=(none, none))
    return Objective(Losses.model_validate({"labels": {}}), layers, pair, steps=steps), layers
