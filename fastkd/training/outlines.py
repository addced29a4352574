"""Models of a recipe without numbers, from their configurations alone, on torch's meta device."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from fastkd.errors import FOREIGN_ERRORS
from fastkd.layer_map import LayerMap, make_layer_map
from fastkd.models import outline_student, student_layers
from fastkd.models.half import kept_whole, round_buffers, round_parameters
from fastkd.models.load import auto_model, read_config
from fastkd.models.locate import locate_model
from fastkd.models.poolers import drop_pooler
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.types import Head


def outlined(recipe: Recipe, config: Any) -> tuple[PreTrainedModel, PreTrainedModel, LayerMap]:
    """Teacher and student, and which of their layers are compared.

    Args:
        recipe: without `auto`.
        config: of the teacher's folder.

    Raises:
        UserError: a student that can't be made; what transformers raises of a teacher passes.
    """
    with torch.device("meta"):
        teacher = _read(config, recipe.student.head, getattr(torch, recipe.teacher.states))
        depths = student_layers(recipe.student, config), config.num_hidden_layers
        layers = make_layer_map(recipe.layer_map, *depths, seed=recipe.train.seed)
        # others keep what sdpa keeps, but may not be installed here
        attention = "eager" if recipe.student.attention == "eager" else "sdpa"
        student = outline_student(teacher.requires_grad_(False), recipe.student, layers, attention)
        if recipe.train.precision == "bf16":
            round_buffers(student)
            round_parameters(student)
    return teacher, student, layers


def trains_in_half(recipe: AnyRecipe) -> bool:
    """Whether what a recipe trains may be rounded to bf16, see `kept_whole`; also said of what
    can't be made from its configuration, which the run refuses or tries.

    Args:
        recipe: without `auto`.
    """
    with suppress(*FOREIGN_ERRORS), torch.device("meta"):
        source = recipe.teacher.source if isinstance(recipe, Recipe) else recipe.model.source
        config = read_config(locate_model(source.name), source.name, source.revision)
        if isinstance(recipe, Recipe):
            return kept_whole(outlined(recipe, config)[1]) is None
        return kept_whole(_read(config, recipe.task.kind, torch.float32)) is None
    return True


def _read(config: Any, head: Head, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = auto_model(head).from_config(config, dtype=dtype)
    if head == "none":
        drop_pooler(model)
    return model
