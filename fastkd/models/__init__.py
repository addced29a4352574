"""Teacher, tokenizer and student: load, check, shrink, initialise."""

from fastkd.models.checking import LOADING_ERRORS, not_loadable, optional_file
from fastkd.models.digests import model_digests, note_models
from fastkd.models.load import (
    load_student,
    load_teacher,
    load_tokenizer,
    read_config,
    read_model,
)
from fastkd.models.locate import (
    locate_model,
    locate_source,
    resolve_model,
)
from fastkd.models.modules import ListingError, Module, read_modules
from fastkd.models.poolers import POOLER_MARK, Pooler, set_aside_pooler
from fastkd.models.student import (
    Initialisation,
    build_student,
    check_attention,
    dropout_rates,
    student_config,
)
from fastkd.models.vocabulary import check_same_vocabulary, vocabulary_difference

__all__ = [
    "LOADING_ERRORS",
    "POOLER_MARK",
    "Initialisation",
    "ListingError",
    "Module",
    "Pooler",
    "build_student",
    "check_attention",
    "check_same_vocabulary",
    "dropout_rates",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "locate_model",
    "locate_source",
    "model_digests",
    "not_loadable",
    "note_models",
    "optional_file",
    "read_config",
    "read_model",
    "read_modules",
    "resolve_model",
    "set_aside_pooler",
    "student_config",
    "vocabulary_difference",
]
