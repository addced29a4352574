"""Write the student as others expect to find it: Hugging Face format, projections apart.

Where the teacher is a sentence-transformers model, so is the student (`sentences.py`); where its
architecture has a pooler, it has one (`poolers.py`). What can't be handed on is said before the
first step, and stands in the student's model card (`fastkd.training.card`). Everything is written
beside its place and renamed at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import usable_positions
from fastkd.data.sequences import name_token_types, uses_token_types
from fastkd.distributed import Ranks
from fastkd.files.disk import (
    disk_errors,
    replace_folder,
    settle,
    temporary_of,
)
from fastkd.losses.factory import compares_directions
from fastkd.losses.objective import DistilledStudent, Objective
from fastkd.losses.pooling import EmbeddingModules
from fastkd.models import locate_model, read_config
from fastkd.training.engine import whole_weights
from fastkd.training.export.poolers import (
    mark_pooler,
    pooler_note,
    pooler_to_add,
)
from fastkd.training.export.sentences import SentenceModules, sentence_modules, write_modules
from fastkd.training.run_folder import RunFolder
from fastkd.types import ModelSource


def export_notes(
    student: PreTrainedModel, modules: SentenceModules, source: ModelSource
) -> list[str]:
    """What a student will be handed on without, or with what is not its own, one line each.

    Args:
        student: as it is trained.
        modules: from `exported_modules`.
        source: the model that it was made from.
    """
    return [*modules.notes(source), *pooler_note(student)]


def exported_modules(
    objective: Objective,
    source: ModelSource,
    teacher_config: PreTrainedConfig,
    student_config: PreTrainedConfig,
    prompts: Mapping[str, str],
) -> SentenceModules:
    """The modules of a sentence-transformers model that a run's student is exported with.

    Args:
        objective: the run's, whose parameters must be whole.
        source: the model that the student was made from.
        teacher_config: that model's configuration.
        student_config: the student's.
        prompts: that the texts were read with, by name.
    """
    head = objective.pair.head
    return sentence_modules(
        source,
        teacher_config,
        student_config,
        head,
        _student_embedding(objective, prompts),
        compares_directions(objective.losses, head),
    )


def _student_embedding(objective: Objective, prompts: Mapping[str, str]) -> EmbeddingModules | None:
    """The student's embedding where its folder must say it, because losses decide it, prompts are
    handed on, or others would pool a plain transformer's otherwise."""
    stated = objective.student_modules()
    if stated is not None:
        return stated
    found = objective.embedding("student")
    plain = found is None or found.pooling == ("mean",) or objective.pair.head != "none"
    return None if plain and not prompts else found


def export_student(
    engine: Any,
    *,
    source: ModelSource,
    config_values: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    run: RunFolder,
    ranks: Ranks,
    prompts: Mapping[str, str],
    start: ModelSource | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `student/` and `projections.safetensors` of a run; called by all ranks.

    Args:
        engine: around a `DistilledStudent`.
        source: the model that it was made from.
        config_values: values of its configuration that it is handed on with in place of those it
            was trained with, by name: dropout rates, and the id of the padding token.
        tokenizer: that the student is handed on with.
        run: where to.
        ranks: this process among all.
        prompts: that the texts were read with, by name.
        start: the model that the student began as, where it is another one than the teacher.
        weights: of an earlier step, by the names of the module's parameters, which are exported in
            place of those of now; on the first rank.

    Raises:
        UserError: the disk is full, or failed.
    """
    module: DistilledStudent = engine.module

    def write() -> None:
        if weights is not None:
            for name, parameter in module.named_parameters():
                parameter.data.copy_(weights[name])
        folder, projections = temporary_of(run.student), temporary_of(run.projections)
        shutil.rmtree(folder, ignore_errors=True)
        # whoever trains on from here expects the usual dropout rates and padding
        for name, value in config_values.items():
            setattr(module.student.config, name, value)
        _write_model(module.student, folder)
        _write_tokenizer(module.student, tokenizer, folder)
        _write_around(module, source, prompts, start, folder)
        kept = {k: v.contiguous() for k, v in module.objective.kept().items()}
        save_file(kept, projections)
        settle(projections)
        settle(folder)
        os.replace(projections, run.projections)
        replace_folder(folder, run.student)

    with whole_weights(engine, module.parameters()), disk_errors(run.student):
        ranks.from_main(write)


def _write_model(student: PreTrainedModel, folder: Path) -> None:
    origin, pooler = pooler_to_add(student)
    mark_pooler(student, origin)
    state = {**student.state_dict(), **pooler} if pooler else None
    student.save_pretrained(folder, state_dict=state)


def _write_tokenizer(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    if uses_token_types(student.config, tokenizer):
        name_token_types(tokenizer)
    positions = usable_positions(student)
    if positions is not None:
        # whoever cuts by it would give the model texts that it can't read
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    tokenizer.save_pretrained(folder)


def _write_around(
    module: DistilledStudent,
    source: ModelSource,
    prompts: Mapping[str, str],
    start: ModelSource | None,
    folder: Path,
) -> None:
    """What other libraries read, and what people should."""
    student = module.student
    teacher_config = read_config(locate_model(source.name), f"model {source.name}", source.revision)
    modules = exported_modules(module.objective, source, teacher_config, student.config, prompts)
    write_modules(modules, source, folder, student, prompts, start)


def load_projections(objective: Objective, run: RunFolder) -> None:
    """Give an objective the projections that a run was trained with."""
    weights = load_file(run.projections)
    assert weights.keys() == objective.kept().keys(), "the recipe is that of the run"
    objective.load_state_dict(weights, strict=False)
