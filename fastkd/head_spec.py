"""One table of heads: what can stand on a model's blocks, and all that follows from it.

A new kind of head is a word in `fastkd.types.Head` and a row here; whoever needs to know asks the
row, not the name. It stands below recipes and models, and loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fastkd.types import Head, TaskKind

Labels = Literal["example", "token", "span", "next_token", "masked_token"]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What one head is, and what it goes with."""

    auto_model: str
    """Class of transformers that loads a model with it."""
    hub_task: str
    """What the hub calls what it does."""
    has_pipeline: bool = True
    """Whether transformers has a pipeline of that name."""
    classes: str = ""
    """Table of `transformers.models.auto.modeling_auto` that names the classes that have it."""
    losses: tuple[str, ...] = ()
    """Losses that need it, beside those of layers, which fit every head."""
    labels: Labels | None = None
    """What a label is of: an example of a task, the first token of each of its words, the first and
    the last token of a span of it, or a token of text; `None`: it learns none."""
    data: Literal["text", "task"] = "text"
    """Section of the recipe that it is trained on where its labels are read."""
    columns: tuple[tuple[str, ...], str] | None = None
    """Columns of the texts and of the label of its tasks, where a recipe names none."""
    language_model: bool = False
    """Whether it multiplies the last hidden state with the vocabulary, so that its logits are
    never written out."""
    untrained_teacher: str = ""
    """What to do about a teacher whose head has no weights; empty where they may be missing, and
    are refused as any other weight is."""
    sentence_tasks: tuple[str, ...] = ()
    """What a transformer module of sentence-transformers asks of a model that has it."""


HEADS: dict[Head, HeadSpec] = {
    "none": HeadSpec(
        auto_model="AutoModel",
        hub_task="feature-extraction",
        sentence_tasks=("feature-extraction",),
    ),
    "sequence_classification": HeadSpec(
        auto_model="AutoModelForSequenceClassification",
        hub_task="text-classification",
        classes="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        losses=("logits", "labels"),
        labels="example",
        data="task",
        untrained_teacher="train it with fastkd finetune first",
        sentence_tasks=("sequence-classification",),
    ),
    "token_classification": HeadSpec(
        auto_model="AutoModelForTokenClassification",
        hub_task="token-classification",
        classes="MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        losses=("logits", "labels"),
        labels="token",
        data="task",
        columns=(("tokens",), "tags"),
        untrained_teacher="train it with fastkd finetune first",
    ),
    "question_answering": HeadSpec(
        auto_model="AutoModelForQuestionAnswering",
        hub_task="question-answering",
        has_pipeline=False,
        classes="MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        losses=("logits", "labels"),
        labels="span",
        data="task",
        columns=(("question", "context"), "answers"),
        untrained_teacher="train it with fastkd finetune first",
    ),
    "causal_lm": HeadSpec(
        auto_model="AutoModelForCausalLM",
        hub_task="text-generation",
        classes="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        losses=("logits", "labels"),
        labels="next_token",
        language_model=True,
        sentence_tasks=("feature-extraction", "text-generation"),
    ),
    "masked_lm": HeadSpec(
        auto_model="AutoModelForMaskedLM",
        hub_task="fill-mask",
        classes="MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        losses=("logits", "mlm"),
        labels="masked_token",
        language_model=True,
        sentence_tasks=("feature-extraction", "fill-mask"),
    ),
}

TASK_HEAD: TaskKind = "sequence_classification"
"""The head that learns a task whose kind a recipe does not name."""


def heads_of_loss(loss: str) -> tuple[Head, ...]:
    """The heads that a loss needs one of; none of a loss that fits every head."""
    return tuple(head for head, spec in HEADS.items() if loss in spec.losses)


def head_of_task(section: object) -> TaskKind:
    """The head that a task is learned by, from its section before that is read."""
    kind = section.get("kind") if isinstance(section, Mapping) else getattr(section, "kind", None)
    return next((head for head in get_args(TaskKind) if head == kind), TASK_HEAD)
