"""A recipe: one YAML file that says everything about a run, read into frozen models.

Every field refuses unknown keys and wrong types where it is read, so that a run never starts on a
misread setting.
"""

from fastkd.recipe.data import Data
from fastkd.recipe.losses import (
    AttentionLoss,
    EmbeddingLoss,
    HiddenLoss,
    LabelsLoss,
    LogitsLoss,
    Losses,
    MlmLoss,
    RelationsLoss,
    Term,
)
from fastkd.recipe.models import Student, Teacher
from fastkd.recipe.reading import (
    complain,
    dump_recipe,
    load_recipe,
    parse_recipe,
    read_tree,
    replace_value,
)
from fastkd.recipe.section import Section
from fastkd.recipe.train import Run, Train
from fastkd.recipe.weights import Balance, Schedule
from fastkd.recipe.whole import Recipe

__all__ = [
    "AttentionLoss",
    "Balance",
    "Data",
    "EmbeddingLoss",
    "HiddenLoss",
    "LabelsLoss",
    "LogitsLoss",
    "Losses",
    "MlmLoss",
    "Recipe",
    "RelationsLoss",
    "Run",
    "Schedule",
    "Section",
    "Student",
    "Teacher",
    "Term",
    "Train",
    "complain",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "read_tree",
    "replace_value",
]
