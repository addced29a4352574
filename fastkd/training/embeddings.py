"""What makes embeddings of a run's models: the teacher's modules, and those a student gets."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedModel

from fastkd.capture import sees_ahead
from fastkd.errors import UserError
from fastkd.losses.factory import embedding_losses
from fastkd.losses.pooling import EmbeddingModules, PoolingMode
from fastkd.models import UnknownModule, read_embedding, stands_apart
from fastkd.models.sentence_folder import list_modules
from fastkd.recipe import Recipe
from fastkd.training.export import check_prompts
from fastkd.types import ModelSource


def find_embeddings(
    recipe: Recipe,
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    pooling: Sequence[PoolingMode] | None = None,
) -> tuple[EmbeddingModules, EmbeddingModules] | None:
    """What makes embeddings of student and teacher, as of `ModelPair`; `None` where fastkd doesn't
    know the teacher's modules and no loss asks.

    Args:
        recipe: of the run.
        teacher: configuration of the teacher.
        student: of the student.
        pooling: of the student, from `own_pooling`; the teacher's where not given.

    Raises:
        UserError: it doesn't, and one asks; or prompts of the data contradict the teacher's.
    """
    readers = embedding_losses(recipe.losses, recipe.student.head)
    asks = [f"losses.{name}" for name in readers]
    if recipe.evaluate is not None:
        asks.append("evaluate")
    stated = [config.pooling for config in readers.values() if config.pooling is not None]
    default: PoolingMode = stated[0] if stated else "mean"
    source, head = recipe.teacher.source, recipe.student.head
    if recipe.data is not None:
        check_prompts(source, recipe.data.prompts)
    try:
        found = read_embedding(source, teacher, head, default)
    except UnknownModule as error:
        if not asks:
            return None
        raise UserError(f"{asks[0]} compares embeddings, but teacher.{error}") from error
    return found.of_student(student.hidden_size, pooling=pooling), found


def own_pooling(
    recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel, start: ModelSource | None
) -> Sequence[PoolingMode] | None:
    """How a student pools that is another model than its teacher: as its own modules say or, of a
    plain transformer, as the teacher's where both see their tokens from the same sides. Else the
    mean: a decoder's first token has seen no other.

    Args:
        recipe: of the run.
        student: of whatever architecture.
        teacher: likewise.
        start: where the student's modules may lie; `None` of one that was made of the teacher.

    Returns:
        `None` where it is the teacher's, or no loss compares embeddings.

    Raises:
        UserError: its own modules can't be read.
    """
    readers = embedding_losses(recipe.losses, recipe.student.head).values()
    stated = any(config.pooling is not None for config in readers)
    if start is None or not readers or stated:
        return None
    if not stands_apart(student.config, recipe.student, teacher.config):
        return None
    if list_modules(start, "none").modules:
        return read_embedding(start, student.config).pooling
    return None if sees_ahead(student) == sees_ahead(teacher) else ("mean",)
