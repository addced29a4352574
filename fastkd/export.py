"""Write the student as others expect to find it: Hugging Face format, projections apart.

Where the teacher is a sentence-transformers model, so is the student: pooling and normalisation
have no weights and carry over. Everything is written beside its place and renamed at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from fastkd.engine import DistilledStudent, Ranks
from fastkd.models import locate_model
from fastkd.objective import Objective
from fastkd.recipe import Teacher
from fastkd.run_folder import RunFolder, disk_errors

_WEIGHTLESS = ("Transformer", "Pooling", "Normalize")


def export_student(
    engine: Any,
    source: Teacher,
    rates: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    run: RunFolder,
    ranks: Ranks,
) -> None:
    """Write `student/` and `projections.safetensors` of a run; called by all ranks.

    Args:
        engine: around a `DistilledStudent`.
        source: the model that it was made from.
        rates: dropout rates that the student is handed on with.
        tokenizer: of both.
        run: where to.
        ranks: this process among all.

    Raises:
        UserError: the disk is full.
    """
    module: DistilledStudent = engine.module
    with _whole_weights(engine, module), disk_errors(run.student):
        if ranks.is_main:
            folder = run.path / ".student"
            shutil.rmtree(folder, ignore_errors=True)
            # whoever trains on from here expects the usual rates
            for name, rate in rates.items():
                setattr(module.student.config, name, rate)
            module.student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if module.objective.pair.head != "sequence_classification":
                _write_sentence_modules(folder, source, module.student.config.hidden_size)
            shutil.rmtree(run.student, ignore_errors=True)
            folder.rename(run.student)
            weights = {k: v.contiguous() for k, v in module.objective.kept().items()}
            save_file(weights, run.projections)
    ranks.barrier()


def load_projections(objective: Objective, run: RunFolder) -> None:
    """Give an objective the projections that a run was trained with."""
    weights = load_file(run.projections)
    assert weights.keys() == objective.kept().keys(), "the recipe is that of the run"
    objective.load_state_dict(weights, strict=False)


def _whole_weights(engine: Any, module: DistilledStudent) -> AbstractContextManager[Any]:
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    import deepspeed

    # a parameter that a last prefetch left in flight would be skipped below, and read half-filled
    engine.empty_partition_cache()
    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        list(module.parameters())
    )
    return gathered


def _write_sentence_modules(folder: Path, teacher: Teacher, width: int) -> None:
    """Copy the pooling and normalisation of a sentence-transformers teacher, at `width`."""
    listing = _teacher_file(teacher, "modules.json")
    if listing is None:
        return
    modules = json.loads(listing.read_text(encoding="utf-8"))
    if any(module["type"].rsplit(".", 1)[-1] not in _WEIGHTLESS for module in modules):
        return
    for module in modules:
        if not module["path"]:
            continue
        (folder / module["path"]).mkdir()
        source = _teacher_file(teacher, f"{module['path']}/config.json")
        if source is not None:
            config = json.loads(source.read_text(encoding="utf-8"))
            for key in ("word_embedding_dimension", "embedding_dimension"):
                if key in config:
                    config[key] = width
            target = folder / module["path"] / "config.json"
            target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        source = _teacher_file(teacher, name)
        if source is not None:
            shutil.copyfile(source, folder / name)
    shutil.copyfile(listing, folder / "modules.json")


def _teacher_file(teacher: Teacher, name: str) -> Path | None:
    found = cached_file(
        locate_model(teacher),
        name,
        revision=teacher.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
