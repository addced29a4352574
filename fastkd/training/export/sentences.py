"""The modules of a sentence-transformers model that a student is exported with.

Those of such a teacher are carried: pooling, normalisation and the like have no weights and are
carried at the student's width. Weights (Dense, LayerNorm, ...) are carried byte for byte where the
vectors that they are given are as wide as the teacher's, those that weigh layers where the student
is as deep too: they were trained on the teacher's vectors, which such a student learns to give.
What is left out is named before the first step.

Where the losses say how the student's embedding is made (`Objective.student_modules`), its pooling
is theirs, and a projection that they learn stands behind it as a Dense, in front of all that the
teacher has there: the student's embeddings lie in the teacher's space. A teacher that is a plain
transformer then gets a student with modules too.

A student with a classification head is no encoder of sentences: it takes modules over from a
reranker alone, and those of an encoder are left out without a note.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel

from fastkd.capture import usable_positions
from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.losses.pooling import Dense, EmbeddingModules
from fastkd.models import Module, read_embedding
from fastkd.models.embedding import pooling_settings
from fastkd.models.sentence_folder import (
    CONFIGS,
    LIBRARY,
    WEIGHTS,
    joined,
    known_prompts,
    list_modules,
    module_file,
    read_object,
    reading_settings,
    settings_file,
    similarity_name,
    source_file,
    truncate_dim,
)
from fastkd.types import Head, ModelSource

_WEIGHTLESS = ("Pooling", "Normalize", "Dropout", "WordWeights", "SpladePooling", "LogitScore")
_WIDE = ("Dense", "LayerNorm", "CNN", "LSTM", "SparseAutoEncoder")
_DEEP = ("WeightedLayerPooling",)


@dataclass(frozen=True)
class SentenceModules:
    """What a student is exported with, and what of its teacher's isn't."""

    kept: tuple[Module, ...] = ()
    """Modules in order, the transformer first; nothing of a student that is no such model."""
    lost: tuple[str, ...] = ()
    """Each with the reason."""
    student_embedding: EmbeddingModules | None = None
    """What the losses say of the student's embedding."""
    new_pooling: bool = False
    """Whether the pooling is theirs, not the teacher's."""
    similarity: str = "cosine"
    """What the teacher's embeddings are compared by."""
    directions_only: bool = False
    """Whether the lengths of the student's were not learned, so that cosines alone mean something
    where the teacher's similarity reads lengths."""

    def notes(self, teacher: ModelSource) -> list[str]:
        """What the user must know."""
        found = []
        if self.lost:
            found.append(
                f"teacher.model {teacher.name}: of its sentence-transformers modules the student "
                f"goes without {'; '.join(self.lost)}"
            )
        embedding = self.student_embedding
        if embedding is not None and (self.new_pooling or embedding.projection is not None):
            other = self.new_pooling and self.kept not in (_PLAIN, _OF_SEVERAL)
            space = "; the teacher's own modules pool otherwise, to another space" if other else ""
            found.append(f"embedding of the student: {embedding.describe()}{space}")
        if self.directions_only:
            found.append(
                f"teacher.model {teacher.name}: its embeddings are compared by {self.similarity}, "
                "but the losses compare directions alone, so the student's are by cosine; "
                "losses.embedding_output.kind vector_mse and losses.score.similarity dot learn "
                "lengths too"
            )
        return found


def sentence_modules(
    teacher: ModelSource,
    teacher_config: PreTrainedConfig,
    student_config: PreTrainedConfig,
    head: Head,
    student_embedding: EmbeddingModules | None = None,
    directions: bool = False,
) -> SentenceModules:
    """Which modules a student is exported with; reads small files alone.

    Args:
        teacher: where its modules lie.
        teacher_config: the teacher's configuration.
        student_config: the student's.
        head: the student's.
        student_embedding: what the losses say of the student's embedding.
        directions: whether these compare embeddings scaled to length one.
    """
    if student_embedding is not None and student_embedding.alone:
        return SentenceModules(_OF_SEVERAL, (), student_embedding, new_pooling=True)
    modules, reason = list_modules(teacher, head)
    if not modules:
        if reason is None and student_embedding is not None and HEADS[head].data != "task":
            return SentenceModules(_PLAIN, (), student_embedding, new_pooling=True)
        return SentenceModules(lost=() if reason is None else (reason,))
    projected = student_embedding is not None and student_embedding.projection is not None
    kept, lost = [modules[0]], []
    for module in modules[1:]:
        why = _why_not(teacher, module, teacher_config, student_config, projected)
        if why is None:
            kept.append(module)
        else:
            lost.append(f"{module.kind} ({why})")
    new_pooling = student_embedding is not None and (
        student_embedding.pooling != read_embedding(teacher, teacher_config, head).pooling
    )
    similarity = similarity_name(teacher)
    # of a vector that is cut it is no longer one
    whole = any(module.kind == "Normalize" for module in kept) and truncate_dim(teacher) is None
    lengths = similarity != "cosine" and not whole
    return SentenceModules(
        tuple(kept),
        tuple(lost),
        student_embedding,
        new_pooling,
        similarity,
        directions_only=directions and lengths,
    )


def _entry(kind: str, path: str) -> dict[str, Any]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


_PLAIN = (Module(_entry("Transformer", "")), Module(_entry("Pooling", "1_Pooling")))
_OF_SEVERAL = (*_PLAIN, Module(_entry("Normalize", "2_Normalize")))
"""Modules of a student of several teachers, of whose own modules it has none."""


def write_modules(
    found: SentenceModules,
    teacher: ModelSource,
    folder: Path,
    student: PreTrainedModel,
    prompts: Mapping[str, str],
    start: ModelSource | None,
) -> None:
    """Write what a student is exported with into its folder.

    Args:
        found: from `sentence_modules`.
        teacher: where the modules lie.
        folder: the student's, which holds its model and tokenizer.
        student: whose folder it is.
        prompts: further than the teacher's, by name; checked by `check_prompts`.
        start: the model that the student began as, where it is another one than the teacher.
    """
    if not found.kept:
        return
    entries: list[dict[str, Any]] = []
    embedding = found.student_embedding

    def enter(kind: str, entry: Mapping[str, Any]) -> Path:
        # a folder of ours, whatever the teacher calls it
        number, path = len(entries), f"{len(entries)}_{kind}" if entries else ""
        entries.append({**entry, "idx": number, "name": str(number), "path": path})
        return folder / path

    for module in found.kept:
        place = enter(module.kind, module.entry)
        if place == folder:
            continue
        place.mkdir(parents=True)
        if module.kind == "Pooling" and embedding is not None and found.new_pooling:
            _write(place / "config.json", pooling_settings(embedding))
        else:
            _carry(module, teacher, place, student.config.hidden_size)
        if module.kind == "Pooling" and embedding is not None and embedding.projection is not None:
            _write_dense(embedding.projection, enter("Dense", _entry("Dense", "")))
    _write_reading(teacher, found.kept[0], start, usable_positions(student), folder)
    _write_library(teacher, prompts, folder, found)
    _write(folder / "modules.json", entries)


def check_prompts(teacher: ModelSource, prompts: Mapping[str, str]) -> None:
    """See that prompts of a recipe say nothing else than those of the teacher of the same name.

    Args:
        teacher: whose prompts a student is exported with.
        prompts: the recipe's, by name.

    Raises:
        UserError: one does.
    """
    known = known_prompts(teacher)
    for name, text in prompts.items():
        if known.get(name) and known[name] != text:
            raise UserError(
                f"data.prompts: {name} is {text!r:.100}, but teacher.model {teacher.name} was "
                f"trained with {known[name]!r:.100} under that name; give that, or another name"
            )


def _write_reading(
    teacher: ModelSource,
    first: Module,
    start: ModelSource | None,
    positions: int | None,
    folder: Path,
) -> None:
    """Write how texts are read: as the teacher reads them, but no longer ones than the student
    has positions for, and of another model as many tokens as that one's folder says."""
    path = settings_file(teacher, first)
    if path is None:
        return
    settings = read_object(path) or {}
    # the exported tokenizer does that itself
    settings.pop("do_lower_case", None)
    if start is not None:
        settings["max_seq_length"] = reading_settings(start).get("max_seq_length")
    longest = settings.pop("max_seq_length", None)
    # without it as many as the tokenizer says
    if isinstance(longest, int) and (positions is None or longest <= positions):
        settings["max_seq_length"] = longest
    _write(folder / path.name, settings)


def _write_library(
    teacher: ModelSource, prompts: Mapping[str, str], folder: Path, found: SentenceModules
) -> None:
    _copy(teacher, LIBRARY, folder / LIBRARY)
    changed: dict[str, Any] = {}
    if prompts:
        changed["prompts"] = {**known_prompts(teacher), **prompts}
    if found.directions_only:
        changed["similarity_fn_name"] = "cosine"
    settings = read_object(folder / LIBRARY) or {}
    kept = settings
    if found.kept in (_PLAIN, _OF_SEVERAL):
        # nobody cut the vectors that it learned, and of a plain teacher nobody read these settings
        left = ("truncate_dim", *(["default_prompt_name"] if found.kept == _PLAIN else []))
        kept = {key: value for key, value in settings.items() if key not in left}
    if changed or kept != settings:
        _write(folder / LIBRARY, {**kept, **changed})


def _write_dense(dense: Dense, place: Path) -> None:
    place.mkdir(parents=True)
    weights = {"linear.weight": dense.weight} | (
        {} if dense.bias is None else {"linear.bias": dense.bias}
    )
    # the library reads fp32 into a module of fp32
    save_file(
        {name: tensor.float().cpu().contiguous() for name, tensor in weights.items()},
        place / "model.safetensors",
    )
    size, given = dense.weight.shape
    settings = {"in_features": given, "out_features": size, "bias": dense.bias is not None}
    identity = "torch.nn.modules.linear.Identity"
    _write(place / "config.json", {**settings, "activation_function": identity})


def _carry(module: Module, teacher: ModelSource, place: Path, width: int) -> None:
    for name in (*CONFIGS, *WEIGHTS):
        _copy(teacher, joined(module.path, name), place / name)
    config = place / "config.json"
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
    projected: bool,
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
    if module.kind == "LogitScore" and student_config.vocab_size != teacher_config.vocab_size:
        return "its two tokens are of the teacher's vocabulary"
    if module.kind in _WEIGHTLESS:
        return None
    if module_file(teacher, module, WEIGHTS) is None:
        return "its weights are missing"
    if not projected and student_config.hidden_size != teacher_config.hidden_size:
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
