"""Put a recipe's parts together: corpus, teacher, student, mapping, objective.

Everything that can be wrong with a recipe on this machine is found here, before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import attention_windows, check_capturable, is_causal
from fastkd.data import Corpus, prepare_corpus
from fastkd.deepspeed_config import BatchPlan, plan_batches, student_config
from fastkd.engine import DistilledStudent, Ranks, TeacherRunner, make_engine
from fastkd.errors import UserError
from fastkd.layer_map import LayerMap, make_layer_map
from fastkd.masking import Masking
from fastkd.models import Initialisation, build_student, load_teacher, load_tokenizer
from fastkd.objective import ModelPair, Objective
from fastkd.recipe import Recipe


@dataclass
class Assembly:
    """The parts of one run, on one rank."""

    recipe: Recipe
    ranks: Ranks
    plan: BatchPlan
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    layers: LayerMap
    initialisation: Initialisation
    module: DistilledStudent
    teacher: TeacherRunner
    engine: Any
    masking: Masking | None = None

    @property
    def objective(self) -> Objective:
        """The losses."""
        return self.module.objective

    @property
    def teacher_parameters(self) -> int:
        """Numbers in the teacher, its pooler left out."""
        # a sharded parameter keeps its real size in ds_numel
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.teacher.model.parameters())


def assemble(recipe: Recipe, ranks: Ranks, *, progress: bool = True) -> Assembly:
    """Load, build and check everything that a run needs; collective over the ranks.

    Args:
        recipe: what to build.
        ranks: from `start_ranks`.
        progress: whether tokenising shows a bar.

    Raises:
        UserError: anything about the recipe that does not work on this machine.
    """
    _check_labels(recipe)
    plan = plan_batches(recipe, ranks.world_size)
    config = student_config(recipe, plan)
    torch.manual_seed(recipe.train.seed)
    teacher = load_teacher(recipe.teacher, recipe.student.head)
    check_capturable(teacher, recipe.data.block_size)
    tokenizer = load_tokenizer(recipe.teacher, teacher.get_input_embeddings().num_embeddings)
    layers = make_layer_map(
        recipe.layer_map, recipe.student.layers, teacher.config.num_hidden_layers
    )
    student, initialisation = build_student(teacher, recipe.student, layers)
    check_capturable(student, recipe.data.block_size)
    objective = make_objective(recipe, layers, student, teacher)
    masking = make_masking(recipe, tokenizer)
    corpus = share_corpus(recipe, tokenizer, ranks, progress=progress)
    module = DistilledStudent(student, objective)
    runner = TeacherRunner(teacher, recipe, objective, ranks)
    engine = make_engine(module, recipe.train, config, ranks)
    # dropout must differ between ranks; everything before must not
    torch.manual_seed(recipe.train.seed + 1 + ranks.rank)
    return Assembly(
        recipe,
        ranks,
        plan,
        corpus,
        tokenizer,
        layers,
        initialisation,
        module,
        runner,
        engine,
        masking,
    )


def _check_labels(recipe: Recipe) -> None:
    if recipe.losses.labels is not None and recipe.student.head == "sequence_classification":
        raise UserError(
            "losses.labels learns from labelled examples, but data.train is text without labels; "
            "leave losses.labels out"
        )


def make_objective(
    recipe: Recipe, layers: LayerMap, student: PreTrainedModel, teacher: PreTrainedModel
) -> Objective:
    """The objective of a recipe for two models.

    Raises:
        UserError: the models don't fit together.
    """
    losses = recipe.losses
    heads = student.config.num_attention_heads, teacher.config.num_attention_heads
    if losses.attention and heads[0] != heads[1]:
        raise UserError(
            f"losses.attention compares heads one by one, but the student has {heads[0]} and the "
            f"teacher {heads[1]}; set student.heads={heads[1]}, or leave the term out"
        )
    compares = losses.relations or (losses.attention and losses.attention.kind != "score_mse")
    pair = ModelPair(
        widths=(student.config.hidden_size, teacher.config.hidden_size),
        causal=is_causal(teacher),
        heads=heads,
        windows=(attention_windows(student), attention_windows(teacher)) if compares else ({}, {}),
        head=recipe.student.head,
        outputs=teacher.config.num_labels,
    )
    depths = layers.student_layers, layers.teacher_layers
    own = {
        name: make_layer_map(given, *depths)
        for name, term in losses.terms.items()
        if (given := getattr(term, "layer_map", None)) is not None
    }
    return Objective(losses, layers, pair, own_layers=own, steps=recipe.train.steps)


def make_masking(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Masking | None:
    """What masks the inputs of the `mlm` term, if it is on.

    Raises:
        UserError: the tokenizer has no mask token.
    """
    loss = recipe.losses.mlm
    return None if loss is None else Masking(tokenizer, loss.probability, recipe.train.seed)


def share_corpus(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, *, progress: bool
) -> Corpus:
    """The corpus of a recipe: rank 0 builds its cache, then the others open it."""
    built: list[Corpus] = []

    def build() -> None:
        built.append(prepare_corpus(recipe.data, tokenizer, build=True, progress=progress))

    ranks.from_main(build)
    if not ranks.is_main:
        built.append(prepare_corpus(recipe.data, tokenizer, build=False, progress=False))
    return built[0]
