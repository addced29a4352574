"""Teacher, tokenizer and student: load, check, shrink, initialise."""

from fastkd.models.loading import (
    load_student,
    load_teacher,
    load_tokenizer,
    locate_model,
    not_loadable,
    read_model,
    resolve_model,
)
from fastkd.models.students import Initialisation, build_student, dropout_rates, student_config

__all__ = [
    "Initialisation",
    "build_student",
    "dropout_rates",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "locate_model",
    "not_loadable",
    "read_model",
    "resolve_model",
    "student_config",
]
