"""A recipe: one YAML file that says everything about a run, read into frozen models.

Every field refuses unknown keys and wrong types where it is read, so that a run never starts on a
misread setting. One file a section; `loading.py` reads and overrides, `presets.py` writes out a
published method, `stages.py` makes a recipe of each stage, `merge.py` lays one mapping over
another.

Importing it loads neither torch nor transformers, so that a mistake is told at once. Builders
elsewhere take plain arguments: a section is read where a command begins, and never made to call
another function.
"""

from fastkd.recipe.data import Data
from fastkd.recipe.evaluate import Evaluate
from fastkd.recipe.finetune import FinetuneRecipe, TunedModel
from fastkd.recipe.loading import (
    AnyRecipe,
    apply_overrides,
    complain,
    dump_recipe,
    each_stage,
    load_any_recipe,
    load_finetune_recipe,
    load_recipe,
    parse_any_recipe,
    parse_finetune_recipe,
    parse_recipe,
    read_tree,
    replace_value,
    sequence_limit,
    stage_recipes,
)
from fastkd.recipe.losses import Losses
from fastkd.recipe.models import Student, Teacher
from fastkd.recipe.recipe import Recipe
from fastkd.recipe.task import TaskAugmentation, TaskColumns, TaskData, TaskSelection
from fastkd.recipe.train import RunOutput, Train, resolve_steps
from fastkd.recipe.weights import Balance, LossConfig, Schedule
from fastkd.recipe.yaml_text import write_yaml
from fastkd.section import Section

__all__ = [
    "AnyRecipe",
    "Balance",
    "Data",
    "Evaluate",
    "FinetuneRecipe",
    "LossConfig",
    "Losses",
    "Recipe",
    "RunOutput",
    "Schedule",
    "Section",
    "Student",
    "TaskAugmentation",
    "TaskColumns",
    "TaskData",
    "TaskSelection",
    "Teacher",
    "Train",
    "TunedModel",
    "apply_overrides",
    "complain",
    "dump_recipe",
    "each_stage",
    "load_any_recipe",
    "load_finetune_recipe",
    "load_recipe",
    "parse_any_recipe",
    "parse_finetune_recipe",
    "parse_recipe",
    "read_tree",
    "replace_value",
    "resolve_steps",
    "sequence_limit",
    "stage_recipes",
    "write_yaml",
]
