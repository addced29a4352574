"""What makes embeddings of a run's models: the teacher's modules, and those a student gets."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import sees_ahead
from fastkd.errors import UserError
from fastkd.losses.factory import embedding_losses
from fastkd.losses.objective import Objective
from fastkd.losses.pooling import EmbeddingModules, PoolingMode
from fastkd.models import UnknownModule, read_embedding, stands_apart
from fastkd.models.sentence_folder import (
    default_prompt,
    is_unsure,
    known_prompts,
    list_modules,
    reading_settings,
)
from fastkd.recipe import Recipe
from fastkd.training.export import check_prompts
from fastkd.types import ModelSource

logger = logging.getLogger(__name__)


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
        UserError: it doesn't, and one asks.
    """
    readers = embedding_losses(recipe.losses, recipe.student.head)
    asks = [f"losses.{name}" for name in readers]
    if recipe.evaluate is not None:
        asks.append("evaluate")
    stated = [config.pooling for config in readers.values() if config.pooling is not None]
    default: PoolingMode | None = stated[0] if stated else None
    source, head = recipe.teacher.source, recipe.student.head
    if asks and not stated and is_unsure(source):
        raise UserError(
            f"{asks[0]} compares embeddings, but modules.json of teacher.model {source.name} is "
            "not in the cache and the hub can't be asked whether there is one; run once with a "
            "connection, or give the losses' pooling"
        )
    try:
        found = read_embedding(source, teacher, head, default)
    except UnknownModule as error:
        if not asks:
            return None
        raise UserError(f"{asks[0]} compares embeddings, but teacher.{error}") from error
    return found.of_student(student.hidden_size, pooling=pooling), found


def handed_on_prompts(recipe: Recipe) -> dict[str, str]:
    """What a student is exported with: the prompts of the data by their columns and, as other
    programs ask for them, of the first of several columns as `query`, of the second as `document`.

    Args:
        recipe: of the run.

    Raises:
        UserError: the teacher has others of these names.
    """
    data, teacher = recipe.data, recipe.teacher.source
    if data is None:
        return {}
    check_prompts(teacher, data.prompts)
    columns, known, found = data.columns or (), known_prompts(teacher), dict(data.prompts)
    for name, column in zip(("query", "document"), columns, strict=False):
        text = data.prompts.get(column)
        if len(columns) < 2 or text is None or name in found:
            continue
        if known.get(name) and known[name] != text:
            raise UserError(
                f"data.prompts: {column} is {text!r:.100}, but teacher.model {teacher.name} was "
                f"trained with {known[name]!r:.100} before a {name}; give that"
            )
        found[name] = text
    return found


def prompt_notes(recipe: Recipe) -> list[str]:
    """What the user of a reranker must put before its texts, which no folder does for them.

    Args:
        recipe: of the run.
    """
    form = recipe.row_form
    if form is None or not form.paired or not any(form.prompt_of):
        return []
    first, *others = form.prompt_of
    if first == default_prompt(recipe.teacher.source, recipe.student.head) and not any(others):
        return []
    given = [(column, form.prompts.get(column)) for column in form.columns]
    said = ", ".join(f"{column} {text!r:.100}" for column, text in given if text)
    return [
        f"data.prompts: the student was trained with {said} before its texts, and CrossEncoder "
        "puts nothing there by itself; give it as in the code of the student's model card"
    ]


def find_default_prompt(recipe: Recipe) -> str:
    """What is put before texts that are given no prompt, as the teacher's folder says; it is said
    where texts are not read by themselves, and so without it.

    Args:
        recipe: of the run.
    """
    source, head = recipe.teacher.source, recipe.student.head
    prompt = default_prompt(source, head)
    if not prompt:
        return ""
    if recipe.row_form is None:
        logger.warning(
            "sentence-transformers puts %.100r before every text of teacher.model %s; blocks and "
            "examples of a task are read without it",
            *(prompt, source.name),
        )
    for other in recipe.teacher.others:
        if default_prompt(other.source, head) != prompt:
            logger.warning(
                "teacher.others %s: reads texts with the prompt of the first teacher, %.100r, "
                "which is not its own",
                *(other.source.name, prompt),
            )
    return prompt


def begin_projection(recipe: Recipe, objective: Objective, student: PreTrainedModel) -> list[str]:
    """Let a student that starts from another model go on with the projection of that model's
    embedding; what must be known where it can't, in a line.

    Args:
        recipe: of the run.
        objective: its losses, whose parameters are whole.
        student: as it starts.
    """
    start, head = recipe.student.starts_from, recipe.student.head
    own = objective.student_modules()
    if start is None or (own is None and (recipe.task is not None or not _has_modules(start))):
        return []
    try:
        found = read_embedding(start, student.config, head)
    except UnknownModule:
        # one that ends otherwise has no such projection
        return []
    first = found.linear_map
    if objective.begin_from(found) or first is None:
        return []
    given = f"student.init {start.name}: its Dense {first.weight.shape[1]} to {len(first.weight)}"
    if own is not None and own.projection is not None:
        return [
            f"{given} doesn't fit the projection of losses.{own.projection.learned_by}, which is "
            "drawn anew"
        ]
    widths = objective.pair.widths
    # of a student as wide as its teacher it is the teacher's, which the student is given anyway
    return [] if widths[0] == widths[1] else [f"{given} is left out: no loss here goes on with it"]


def _has_modules(source: ModelSource) -> bool:
    return bool(list_modules(source, "none").modules)


def compare_lengths(
    recipe: Recipe, source: ModelSource, tokenizer: PreTrainedTokenizerBase, field: str
) -> None:
    """Say where embeddings are made of longer texts than those that their users get.

    Args:
        recipe: of the run.
        source: of one of its teachers.
        tokenizer: of that.
        field: of the recipe, which names it.
    """
    head = recipe.student.head
    judged = recipe.evaluate is not None or embedding_losses(recipe.losses, head)
    if recipe.data is None or not judged or not list_modules(source, head).modules:
        return
    said = reading_settings(source).get("max_seq_length")
    longest = said if isinstance(said, int) else tokenizer.model_max_length
    if recipe.data.block_size > longest:
        logger.warning(
            "data.block_size is %d, but SentenceTransformer cuts texts of %s %s after %d tokens: "
            "of longer ones fastkd reads more than that does",
            *(recipe.data.block_size, field, source.name, longest),
        )


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
