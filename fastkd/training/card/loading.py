"""How a student is loaded: the class that reads its folder, and code that says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.data.tasks.prepare import task_of
from fastkd.head_spec import HEADS
from fastkd.models import ListingError, read_modules
from fastkd.models.sentence_folder import LIBRARY, LISTING, read_object
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.types import Head

SENTENCES = "sentence-transformers"
_HUB_TASKS = {
    "SentenceTransformer": "sentence-similarity",
    "CrossEncoder": "text-ranking",
    "SparseEncoder": "feature-extraction",
    "MultiVectorEncoder": "feature-extraction",
}
"""Classes of sentence-transformers, with what the hub calls what they do."""
_CLASS_OF_MODULE = {
    "LogitScore": "CrossEncoder",
    "SpladePooling": "SparseEncoder",
    "SparseAutoEncoder": "SparseEncoder",
}
"""Classes of folders that don't name theirs, by a module that they hold."""


@dataclass(frozen=True)
class Loading:
    """How a student is loaded and what for."""

    library: str
    hub_task: str
    code: tuple[str, ...]
    """MODEL stands in it for the folder."""
    labels: tuple[str, ...]
    """What the outputs of a classifier are called, in order; of a reranker's one there are none."""


def loading_of(recipe: AnyRecipe, head: Head, student: Path) -> Loading:
    """How the student of a recipe is loaded.

    Args:
        recipe: of either kind.
        head: what stands on the student.
        student: its folder, which is there.
    """
    labels = _labels(student, head)
    kind = _sentence_class(recipe, head, student, len(labels))
    if kind is not None:
        named = labels if len(labels) > 1 else ()
        return Loading(SENTENCES, _HUB_TASKS[kind], _sentence_code(recipe, kind), named)
    spec = HEADS[head]
    if not spec.has_pipeline:
        lines = [
            f"from transformers import AutoTokenizer, {spec.auto_model}",
            "",
            'tokenizer = AutoTokenizer.from_pretrained("MODEL")',
            f'model = {spec.auto_model}.from_pretrained("MODEL")',
        ]
        return Loading("transformers", spec.hub_task, tuple(lines), labels)
    first, *other = _texts(recipe)
    text = first
    if spec.hub_task == "fill-mask":
        text = 'f"a {model.tokenizer.mask_token} text"'
    elif other:
        text = f'{{"text": {first}, "text_pair": {other[0]}}}'
    made = f'model = pipeline("{spec.hub_task}", "MODEL")'
    lines = ["from transformers import pipeline", "", made, f"print(model({text}))"]
    return Loading("transformers", spec.hub_task, tuple(lines), labels)


def _sentence_class(recipe: AnyRecipe, head: Head, student: Path, outputs: int) -> str | None:
    """The class of sentence-transformers that a folder is for, `None` of one of transformers."""
    try:
        kinds = [module.kind for module in read_modules(student / LISTING)]
    except ListingError:
        kinds = []
    if not kinds:
        # of texts that were read in pairs for one score
        return "CrossEncoder" if _is_paired(recipe) and outputs == 1 else None
    said = (read_object(student / LIBRARY) or {}).get("model_type")
    if said in _HUB_TASKS:
        return str(said)
    if HEADS[head].data == "task":
        return "CrossEncoder"
    return _CLASS_OF_MODULE.get(kinds[-1], "SentenceTransformer")


def _sentence_code(recipe: AnyRecipe, kind: str) -> tuple[str, ...]:
    use = 'model.encode(["a text", "another"])'
    if kind == "CrossEncoder":
        before = _prompts(recipe)[:1] if _is_paired(recipe) else []
        # it stands before the first of two texts, in place of one that the folder may name
        prompt = f", prompt={_quoted(before[0])}" if before and before[0] else ""
        other = (_texts(recipe)[1:] or [_quoted("another")])[0]
        use = f'model.predict([("a text", {other})]{prompt})'
    made = f'model = {kind}("MODEL")'
    return f"from sentence_transformers import {kind}", "", made, f"print({use})"


def _texts(recipe: AnyRecipe) -> list[str]:
    """Code of the texts that the student reads together, with what was put before them."""
    if recipe.task is not None:
        two = len(task_of(recipe.task).columns.texts) == 2
        return [_quoted("a text"), _quoted("another")][: 1 + two]
    if not _is_paired(recipe):
        return [_quoted("a text")]
    first, second, *_ = _prompts(recipe)
    return [_quoted(first + "a text"), _quoted(second + "another")]


def _is_paired(recipe: AnyRecipe) -> bool:
    return isinstance(recipe, Recipe) and recipe.row_form is not None and recipe.row_form.paired


def _prompts(recipe: AnyRecipe) -> Sequence[str]:
    assert isinstance(recipe, Recipe) and recipe.row_form is not None, "it reads rows"
    return recipe.row_form.prompt_of


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _labels(student: Path, head: Head) -> tuple[str, ...]:
    if HEADS[head].data != "task":
        return ()
    config: dict[str, Any] = json.loads((student / "config.json").read_text(encoding="utf-8"))
    labels = config.get("id2label") or {}
    return tuple(str(labels[key]) for key in sorted(labels, key=int))
