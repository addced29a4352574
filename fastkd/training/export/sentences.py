"""The modules of a sentence-transformers teacher that its student takes over.

Pooling, normalisation and the like have no weights and are carried at the student's width. Weights
(Dense, LayerNorm, ...) are carried byte for byte where the student is as wide as its teacher, those
that weigh layers where it is as deep too: they were trained on the teacher's vectors, which such a
student learns to give. What is left out is named before the first step.

A student with a classification head is no encoder of sentences: it takes modules over from a
reranker alone, and those of an encoder are left out without a note.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from fastkd.models import Module
from fastkd.models.sentence_folder import (
    CONFIGS,
    SETTINGS,
    WEIGHTS,
    joined,
    list_modules,
    module_file,
    read_object,
    source_file,
)
from fastkd.types import Head, ModelSource

_WEIGHTLESS = ("Pooling", "Normalize", "Dropout", "WordWeights", "SpladePooling")
_WIDE = ("Dense", "LayerNorm", "CNN", "LSTM", "SparseAutoEncoder")
_DEEP = ("WeightedLayerPooling",)


@dataclass(frozen=True)
class SentenceModules:
    """What is carried, and what isn't."""

    kept: tuple[Module, ...] = ()
    """In order, the transformer first; nothing of a teacher that is no such model."""
    lost: tuple[str, ...] = ()
    """Each with the reason."""

    def notes(self, teacher: ModelSource) -> list[str]:
        """What the user must know."""
        if not self.lost:
            return []
        return [
            f"teacher.model {teacher.name}: of its sentence-transformers modules the student goes "
            f"without {'; '.join(self.lost)}"
        ]


def sentence_modules(
    teacher: ModelSource,
    teacher_config: PreTrainedConfig,
    student_config: PreTrainedConfig,
    head: Head,
) -> SentenceModules:
    """Which modules of a teacher its student takes over; reads small files alone.

    Args:
        teacher: where they lie.
        teacher_config: the teacher's configuration.
        student_config: the student's.
        head: the student's.
    """
    modules, reason = list_modules(teacher, head)
    if not modules:
        return SentenceModules(lost=() if reason is None else (reason,))
    kept, lost = [modules[0]], []
    for module in modules[1:]:
        reason = _why_not(teacher, module, teacher_config, student_config)
        if reason is None:
            kept.append(module)
        else:
            lost.append(f"{module.kind} ({reason})")
    return SentenceModules(tuple(kept), tuple(lost))


def write_modules(found: SentenceModules, teacher: ModelSource, folder: Path, width: int) -> None:
    """Write what is carried into the student's folder.

    Args:
        found: from `sentence_modules`.
        teacher: where the modules lie.
        folder: the student's, which holds its model and tokenizer.
        width: of its hidden states.
    """
    if not found.kept:
        return
    entries = []
    for number, module in enumerate(found.kept):
        # a folder of ours, whatever the teacher calls it
        path = f"{number}_{module.kind}" if number else ""
        entries.append({**module.entry, "idx": number, "name": str(number), "path": path})
        if number:
            _write_module(module, teacher, folder / path, width)
    for name in SETTINGS:
        _copy(teacher, joined(found.kept[0].path, name), folder / name)
    name = "config_sentence_transformers.json"
    _copy(teacher, name, folder / name)
    _write(folder / "modules.json", entries)


def _write_module(module: Module, teacher: ModelSource, folder: Path, width: int) -> None:
    folder.mkdir(parents=True)
    for name in (*CONFIGS, *WEIGHTS):
        _copy(teacher, joined(module.path, name), folder / name)
    config = folder / "config.json"
    # a sparse vector is as wide as the vocabulary
    if module.kind == "Pooling":
        settings = read_object(config) or {}
        known = {"word_embedding_dimension", "embedding_dimension"} & settings.keys()
        _write(config, {**settings, **dict.fromkeys(known, width)})


def _why_not(
    teacher: ModelSource,
    module: Module,
    teacher_config: PreTrainedConfig,
    student_config: PreTrainedConfig,
) -> str | None:
    """Why a module can't be carried, `None` where it can."""
    if not module.is_known or module.kind not in (*_WEIGHTLESS, *_WIDE, *_DEEP):
        return "fastkd doesn't know it"
    if not module.stays_inside or not module.path:
        return f"its path is {module.path!r}"
    config = module_file(teacher, module, CONFIGS)
    if module.kind != "Normalize" and config is None:
        return "its configuration is missing"
    if module.kind == "Pooling" and (config is None or read_object(config) is None):
        return "its configuration can't be read"
    if module.kind in _WEIGHTLESS:
        return None
    if module_file(teacher, module, WEIGHTS) is None:
        return "its weights are missing"
    if student_config.hidden_size != teacher_config.hidden_size:
        return (
            f"its weights are for vectors of {teacher_config.hidden_size}, the student's have "
            f"{student_config.hidden_size}"
        )
    if (
        module.kind in _DEEP
        and student_config.num_hidden_layers != teacher_config.num_hidden_layers
    ):
        return (
            f"its weights are for {teacher_config.num_hidden_layers} layers, the student has "
            f"{student_config.num_hidden_layers}"
        )
    return None


def _copy(teacher: ModelSource, name: str, target: Path) -> None:
    source = source_file(teacher, name)
    if source is not None:
        shutil.copyfile(source, target)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
