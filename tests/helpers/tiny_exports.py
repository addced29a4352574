"""Students that are exported without a run, and teachers of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, models
from tiny_cards import tiny_summary
from tiny_models import POSITIONS, VOCABULARY, save_teacher
from transformers import PreTrainedConfig, PreTrainedModel

from fastkd.head_spec import HEADS
from fastkd.layer_map import make_layer_map
from fastkd.losses import ModelPair
from fastkd.losses.objective import DistilledStudent, Objective
from fastkd.models import build_student, load_teacher, load_tokenizer
from fastkd.recipe import Losses, Student, parse_recipe
from fastkd.training.card import write_card
from fastkd.training.export import export_notes, export_student
from fastkd.training.export.sentences import sentence_modules
from fastkd.training.run_folder import RunFolder
from fastkd.types import Head, ModelSource


def made_student(
    teacher: Path, head: Head = "none", **numbers: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student as a run builds it, and its teacher."""
    large = load_teacher(ModelSource(str(teacher)), head=head)
    section = Student(**{"layers": 2, "head": head, **numbers})
    layers = make_layer_map("uniform", section.layers, large.config.num_hidden_layers)
    torch.manual_seed(0)
    return build_student(large, section, layers)[0], large


def exported(folder: Path, teacher: Path, head: Head = "none", **numbers: Any) -> Path:
    """The student's folder of a run that has made no step."""
    student, large = made_student(teacher, head, **numbers)
    depths = student.config.num_hidden_layers, large.config.num_hidden_layers
    widths = student.config.hidden_size, large.config.hidden_size
    layers = make_layer_map("uniform", *depths)
    objective = Objective(
        Losses.model_validate({"hidden": {}}), layers, ModelPair(widths, head=head)
    )
    module = DistilledStudent(student, objective)
    engine = SimpleNamespace(module=module, zero_optimization_stage=lambda: 1)
    ranks: Any = SimpleNamespace(from_main=lambda write: write())
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(str(folder))
    source = ModelSource(str(teacher))
    tokenizer = load_tokenizer(source, 2 * VOCABULARY)
    export_student(
        engine,
        source=source,
        config_values={},
        tokenizer=tokenizer,
        run=run,
        ranks=ranks,
        prompts={},
    )
    tree = {
        "teacher": {"model": str(teacher)},
        "student": {"layers": 2, "head": head, **numbers},
        "losses": {"hidden": {}},
        **_read(head),
        "run": {"output": str(folder)},
    }
    notes = notes_of(student, large.config, source, head)
    write_card(run, parse_recipe(tree), tiny_summary(notes=notes), {})
    return run.student


def notes_of(
    student: PreTrainedModel, teacher_config: PreTrainedConfig, source: ModelSource, head: Head
) -> list[str]:
    """What the user is told of a student whose losses say nothing of its embedding."""
    modules = sentence_modules(source, teacher_config, student.config, head)
    return export_notes(student, modules, source)


def _read(head: Head) -> dict[str, Any]:
    """A section of what a student with a head learns from, text where it may."""
    if not HEADS[head].columns:
        return {"data": {"train": "python-docs"}}
    return {"task": {"name": "t", "kind": head, "source": "org/t", "labels": ["O", "B-x"]}}


def save_sentences(folder: Path, *modules: Any, architecture: str = "bert", **changes: Any) -> Path:
    """A tiny model with modules behind it, as sentence-transformers saves them."""
    save_teacher(folder / "plain", architecture, **changes)
    transformer = models.Transformer(str(folder / "plain"), max_seq_length=POSITIONS - 4)
    whole = SentenceTransformer(modules=[transformer, *modules], device="cpu")
    whole.prompts = {**whole.prompts, "query": "w9 w9 "}
    whole.save_pretrained(str(folder / "sentences"))
    return folder / "sentences"
