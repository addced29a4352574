"""Teacher, tokenizer and student: load, check, shrink, initialise.

`locate.py` finds what a name means, `load.py` reads it whole or refuses it, `checking.py` says why,
`student.py` shrinks a configuration and copies the mapped layers (`per_layer.py`: what a
configuration says of each layer), `classifier.py` fits a head to a task, `vocabulary.py` compares
tokenizers, `digests.py` notes which bytes a run was made from, `half.py` lets a student compute in
bf16, `quantised.py` rounds a teacher's linear layers to eight bits, `sentence_folder.py` finds the
modules of sentence-transformers behind a model and `embedding.py` reads them. `importance.py`
chooses which of the teacher's channels a narrower student takes, `pruning.py` cuts them. Which
heads there are is `fastkd/head_spec.py`.

It trains nothing and knows no engine.
"""

from fastkd.models.checking import LOADING_ERRORS, not_loadable, optional_file
from fastkd.models.digests import (
    model_bytes,
    model_digests,
    model_sources,
    note_models,
    noted_models,
)
from fastkd.models.embedding import UnknownModule, read_embedding
from fastkd.models.load import (
    head_of_classes,
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
    outline_student,
    own_model,
    stands_apart,
    student_config,
    student_layers,
)
from fastkd.models.vocabulary import (
    check_same_vocabulary,
    check_saved,
    read_tokenizer,
    vocabulary_difference,
)

__all__ = [
    "LOADING_ERRORS",
    "POOLER_MARK",
    "Initialisation",
    "ListingError",
    "Module",
    "Pooler",
    "UnknownModule",
    "build_student",
    "check_attention",
    "check_same_vocabulary",
    "check_saved",
    "dropout_rates",
    "head_of_classes",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "locate_model",
    "locate_source",
    "model_bytes",
    "model_digests",
    "model_sources",
    "not_loadable",
    "note_models",
    "noted_models",
    "optional_file",
    "outline_student",
    "own_model",
    "read_config",
    "read_embedding",
    "read_model",
    "read_modules",
    "read_tokenizer",
    "resolve_model",
    "set_aside_pooler",
    "stands_apart",
    "student_config",
    "student_layers",
    "vocabulary_difference",
]
