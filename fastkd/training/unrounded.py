"""The teacher's numbers as its folder holds them, for what a student is copied from.

`teacher.dtype` is what the teacher runs in. A student that trains in fp32 would start from numbers
rounded to it, and be handed on with them where nothing trains them: a frozen vocabulary, a pooler.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from fastkd.data.tasks import Task
from fastkd.models import load_teacher, locate_model, read_config
from fastkd.models.classifier import fit_classifier
from fastkd.models.student import own_model
from fastkd.recipe import Recipe


def is_rounded(recipe: Recipe, config: PreTrainedConfig) -> bool:
    """Whether the teacher as it runs has lost what a student that is copied from it would keep.

    Args:
        recipe: without `auto`.
        config: of the teacher's folder, which says the precision of its weights.
    """
    states = recipe.teacher.states
    # a student in bf16 is rounded to it by its engine
    kept = {"float32", str(config.dtype).removeprefix("torch.")}
    kept |= {"bfloat16"} if recipe.train.precision == "bf16" else set()
    return states not in kept and own_model(recipe.student, config) is None


def unrounded(recipe: Recipe, teacher: PreTrainedModel, task: Task | None) -> PreTrainedModel:
    """The model to copy a student from: the teacher, or where that is rounded its folder's numbers
    in fp32, on the CPU, read for as long as the caller keeps them.

    Args:
        recipe: without `auto`.
        teacher: as it runs.
        task: what its head is for.

    Raises:
        UserError: it can't be read any more.
    """
    source = recipe.teacher.source
    called = f"teacher.model {source.name}"
    config = read_config(locate_model(source.name), called, source.revision)
    if not is_rounded(recipe, config):
        return teacher
    model = load_teacher(source, head=recipe.student.head)
    if task is not None:
        fit_classifier(model, task, called)
    return model
